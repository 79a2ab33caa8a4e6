"""Means, errors and tables."""

import numpy as np


def mean_and_error(values):
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5
