"""Pictures of the table and of the curves."""

import numpy as np

from ..common import mean_and_error, save, subplots


def differences(rows, rivals, path: str) -> None:
    """A panel for each rival: the mean difference of each problem, two errors wide, in
    units of its own standard error, beyond which all bars are cut."""
    size = 2 * len(rivals), 0.3 * len(rows) + 1.2
    figure, axes = subplots(size, 1, len(rivals), sharey=True)
    for i, (axis, rival) in enumerate(zip(np.atleast_1d(axes), rivals)):
        for j, values in enumerate(rows.values()):
            if values[i] is None:
                continue
            score = np.clip(values[i][0] / max(values[i][1], 1e-12), -8, 8)
            colour = "tab:green" if score > 2 else "tab:red" if score < -2 else "grey"
            axis.barh(j, score, color=colour)
        axis.axvline(0, color="black", lw=0.8)
        for x in (-2, 2):
            axis.axvline(x, color="black", lw=0.5, ls=":")
        axis.set(title=rival, xlim=(-8, 8), xlabel="standard errors")
        axis.set_yticks(range(len(rows)), list(rows))
    figure.axes[0].invert_yaxis()  # shared
    save(figure, path, dpi=150)


def curves(rows, path: str) -> None:
    """A panel for each problem: the figure of each method against the budget."""
    figure, axes = subplots((4.5 * len(rows), 3.4), 1, len(rows))
    for axis, row in zip(np.atleast_1d(axes), rows):
        for name, figures in row["figures"].items():
            means, errors = zip(*map(mean_and_error, figures))
            axis.errorbar(row["budgets"], means, errors, label=name)
        count = row["hyperparameters"]
        axis.set(xscale="log", xlabel="trainings", ylabel=f"test {row['metric']}")
        axis.set_title(f"{row['problem']} ({count} hyperparameters)", fontsize=9)
        axis.legend(fontsize=8)
    save(figure, path, dpi=150)
