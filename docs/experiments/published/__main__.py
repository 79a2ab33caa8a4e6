"""See the docstring of the package."""

import argparse
import importlib
import pathlib

from . import __doc__ as doc


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["unbiased", "regression", "cleaning"])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=40_000, help="of `cleaning`")
    parser.add_argument(
        "--parts", default="published,plain,tuned", help="of `cleaning`"
    )
    parser.add_argument("--sets", default="energy,yacht", help="of `regression`")
    parser.add_argument("--methods", help="of `regression`; all by default")
    parser.add_argument("--starts", type=int, default=50, help="of `regression`")
    parser.add_argument("--figure", type=pathlib.Path, help="of `unbiased`")
    args = parser.parse_args()
    name = f"docs.experiments.published.{args.experiment}"
    importlib.import_module(name).main(args)
