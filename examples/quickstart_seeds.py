"""Repeats the quickstart over several seeds and starting values.

    python quickstart_seeds.py
    python quickstart_seeds.py --dataset fashion_mnist --size 1000

A seed stands for one split of the data, one draw of the first weights and one of all
batches. The three runs of a seed share them, so their differences are paired.
"""

import argparse

import numpy as np
import optax
from image_data import load, NAMES
from quickstart import compare, DEFAULT, make_algorithm, make_start


STARTS = {  # decay, noise
    "good": (1e-4, 0.1),
    "too weak": (1e-6, 0.03),
    "too strong": (1e-2, 0.6),
}


def print_table(start: str, accuracies: dict[str, list[float]]) -> None:
    print(f"\nstart: {start}\n{'test accuracy, %':46}{'mean':>7}{'std':>7}", end="")
    print(f"{'gain':>8}{'its SE':>8}")
    default = np.array(accuracies[DEFAULT])
    for name, values in accuracies.items():
        gain = np.array(values) - default
        line = f"{name:46}{np.mean(values):7.2f}{np.std(values, ddof=1):7.2f}"
        if name != DEFAULT:
            error = np.std(gain, ddof=1) / len(gain) ** 0.5
            line += f"{np.mean(gain):+8.2f}{error:8.2f}"
        print(line, flush=True)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    steps: int = 600,
    seeds: int = 5,
    first: int = 0,
) -> dict[str, dict[str, list[float]]]:
    # Made once: a new algorithm would be compiled anew.
    tuner = make_algorithm(steps, outer=optax.adam(0.05))
    fixed = make_algorithm(steps, outer=optax.set_to_zero())
    results = {}
    for name, (decay, noise) in STARTS.items():
        results[name] = {}
        start = make_start(decay, noise)
        for seed in range(first, first + seeds):
            data = load(dataset, folder=folder, size=size, seed=seed)
            rows = compare(data, start, tuner, fixed, steps=steps, seed=seed)
            for row_name, row in rows.items():
                results[name].setdefault(row_name, []).append(100 * row.test)
        print_table(name, results[name])
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--folder", help="with the data; else they are downloaded")
    parser.add_argument("--size", type=int, default=300, help="of the train set")
    parser.add_argument("--steps", type=int, default=600, help="hyperparameter updates")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed")
    main(**vars(parser.parse_args()))
