"""Experiments of papers, repeated with the library. `docs/experiments/published.md`
has the tables.

    python -m docs.experiments.published unbiased
    python -m docs.experiments.published regression --folder DATA
    python -m docs.experiments.published cleaning --folder DATA

DATA holds `uci_regression.npz` and `mnist.npz`. `--quick` is a run of seconds that only
shows that everything works; it makes data of its own. `--json out.json` keeps all that
the tables are made of.
"""
