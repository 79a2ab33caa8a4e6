import os


# Small solves take thirty times as long when threads of BLAS wait for each other on a
# busy machine. This has to be said before NumPy and SciPy load it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
