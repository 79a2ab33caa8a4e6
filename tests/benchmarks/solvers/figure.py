"""What the curves say, as a table and as a picture (which needs Matplotlib)."""

import statistics

import numpy as np

from .runs import MARKS, OURS, PAIRS, RIVALS, SMOOTH, smooth


def each_curve(row, name: str, figure: int) -> np.ndarray:
    """Over marks and seeds; logarithms where means are geometric."""
    curve = smooth(np.array(row["curves"][name])[:, :, figure].T, row["log"])
    return np.log(curve) if row["log"] else curve


def mean_curve(row, name: str, figure: int) -> np.ndarray:
    curve = each_curve(row, name, figure).mean(axis=1)
    return np.exp(curve) if row["log"] else curve


def end(row, name: str, figure: int) -> tuple[float, float]:
    """The figure at the budget and its standard error, which is one of the logarithm
    where means are geometric."""
    values = each_curve(row, name, figure)[MARKS]
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
    return float(np.exp(mean) if row["log"] else mean), float(error)


def reached(row, name: str, value: float, figure: int) -> float:
    """The calls after which the mean curve is down at `value`."""
    below = mean_curve(row, name, figure) <= value
    return row["calls"][name][int(np.argmax(below))] if below.any() else np.inf


def ratio_of_seconds(row, name: str, other: str) -> float:
    pairs = zip(row["seconds"][name], row["seconds"][other])
    return statistics.median(x / y for x, y in pairs)


def best(row, names, figure: int) -> str:
    found = [name for name in names if name in row["curves"]]
    return min(found, key=lambda name: end(row, name, figure)[0])


def against(row, name: str, other: str, figure: int) -> tuple[float, float]:
    """Calls and seconds to where another ends, in those that the other takes."""
    value = end(row, other, figure)[0]
    calls = reached(row, name, value, figure) / reached(row, other, value, figure)
    return calls, calls * ratio_of_seconds(row, name, other)


def paired(row, name: str, other: str, figure: int) -> tuple[float, float]:
    """The difference at the budget over the seeds, and its standard error; in percent
    where means are geometric."""
    at = lambda name: each_curve(row, name, figure)[MARKS]
    difference = (100 if row["log"] else 1) * (at(name) - at(other))
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(error)


def show(row) -> None:
    """For each solver: where it ends, and the difference to the best rival; calls and
    seconds to where the best rival ends, and to where its own rival ends, in those of
    that rival. Then microseconds a call, and megabytes of temporaries and of what is
    carried."""
    for figure, title in enumerate(row["figures"]):
        champion = best(row, RIVALS, figure)
        print(f"{row['problem']}: {title}. The best rival is {champion}.")
        for name in row["curves"]:
            mean, error = end(row, name, figure)
            text = f"  {name:20}{mean:10.4g} ± {error:<8.2g}"
            text += "{:+8.2f} ± {:<6.2f}".format(*paired(row, name, champion, figure))
            text += "{:7.2f}{:7.2f}".format(*against(row, name, champion, figure))
            if PAIRS.get(name) in row["curves"]:
                text += "{:9.2f}{:7.2f}".format(
                    *against(row, name, PAIRS[name], figure)
                )
            print(text, flush=True)
    for name, seconds in row["seconds"].items():
        memory = [x / 1e6 for x in row["memory"][name].values()]
        middle = 1e6 * statistics.median(seconds)
        print(f"  {name:22}{middle:8.1f}{memory[0]:8.2f}{memory[1]:8.2f}", flush=True)


def draw(rows, path: str) -> None:
    """Above against calls, below against seconds. Each of ours has the colour of its
    rival."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(3.3 * len(rows), 6), layout="constrained")
    panels = picture.subplots(2, len(rows), squeeze=False)
    for column, row in zip(panels.T, rows):
        for name in row["curves"]:
            ours = name in OURS
            number = list(OURS if ours else RIVALS).index(name)
            look = {"color": f"C{number}", "lw": 1.8 if ours else 1.2}
            # Before these the running mean has the start in it.
            shown = slice(SMOOTH, MARKS + 1)
            calls = np.array(row["calls"][name])[shown]
            seconds = statistics.median(row["seconds"][name]) * calls
            for axes, x in zip(column, (calls / 1000, seconds)):
                y = mean_curve(row, name, 0)[shown]
                axes.plot(x, y, "-" if ours else "--", label=name, **look)
        column[0].set(title=row["problem"], xlabel="calls, thousands")
        column[1].set(xlabel="CPU seconds")
        for axes in column:
            axes.set_ylabel(row["figures"][0])
            axes.grid(alpha=0.3)
            if row["log"]:
                axes.set_yscale("log")
            else:
                lowest = end(row, best(row, row["curves"], 0), 0)[0]
                axes.set_ylim(0.95 * lowest, 2 * lowest)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    picture.savefig(path, dpi=150)
