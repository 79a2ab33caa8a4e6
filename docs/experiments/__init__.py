"""Long measurements, with seeds, tables and figures.

Each is a command, as `python -m docs.experiments.hyper_cleaning`, in the
root of the repository. Its page below `docs/experiments` says what it found.
"""
