"""Means, medians and their errors."""

import numpy as np


def mean_and_error(values) -> tuple[float, float]:
    """The mean, and its standard error."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def bootstrap(statistic, values, draws: int = 2000) -> tuple[float, float, float]:
    """A statistic, and the ends of its 95% interval."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    drawn = values[rng.integers(0, len(values), (draws, len(values)))]
    low, high = np.quantile(
        [statistic(x) for x in drawn], [0.025, 0.975], method="nearest"
    )
    return float(statistic(values)), float(low), float(high)
