"""What the README and the pages name exists: names of the library, files and modules,
and the options of commands."""

import ast
import importlib.util
import pathlib
import re
from typing import Any

import eqx_hpo as hpo
import pytest


ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Here a name in code is one of the library, unless it is one of these.
OVERVIEWS = ["README.md", "docs/how-to-choose.md", "docs/algorithms.md"]
OTHERS = {"True", "False", "None", "NaN", "NumPy", "JAX"}
# NAME stands for any.
COMMAND = r"python -m (?!\S*NAME)((?:docs\.experiments|tests\.benchmarks)[\w.]*)"
each_page = pytest.mark.parametrize(
    "page", [pytest.param(x, id=str(x.relative_to(ROOT))) for x in PAGES]
)


def _joined(page):
    """Its text with each line that a command goes on in put behind the one before."""
    return re.sub(r"\\?\n\s*(?=\S)", " ", page.read_text())


@each_page
def test_names_of_the_library_exist(page):
    named = re.findall(r"(?<![\w./`-])(?:eqx_)?hpo\.([A-Za-z]\w*)", page.read_text())
    assert {x for x in named if not hasattr(hpo, x)} <= {"py"}


@pytest.mark.parametrize("name", OVERVIEWS)
def test_classes_in_the_overviews_exist(name):
    code = " ".join(re.findall(r"`([^`\n]+)`", (ROOT / name).read_text()))
    classes = set(re.findall(r"(?<![\w./])[A-Z]\w+", code)) - OTHERS
    assert len(classes) > 8
    assert {x for x in classes if not hasattr(hpo, x)} == set()


@each_page
def test_files_exist(page):
    text = page.read_text()
    named = re.findall(r"`((?:docs|examples|eqx_hpo|tests)/[\w/.-]*\w)/?`", text)
    assert [x for x in named if not (ROOT / x).exists()] == []
    for name in re.findall(r"python ((?:docs|examples|tests)/[a-z]\S+\.py)", text):
        assert (ROOT / name).exists(), name


def _options(file):
    """Those that the file writes out, and those that are arguments of its `main`."""
    found = set(re.findall(r'"(--[a-z][\w-]*)"', file.read_text()))
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            args = node.args.args + node.args.kwonlyargs
            found |= {"--" + arg.arg.replace("_", "-") for arg in args}
    return found


@each_page
def test_commands_have_their_modules_and_options(page):
    for module, rest in re.findall(COMMAND + r"([^`\n]*)", _joined(page)):
        found: Any = importlib.util.find_spec(module)
        assert found is not None, module
        file = pathlib.Path(found.origin)
        files = file.parent.glob("*.py") if file.name == "__init__.py" else [file]
        options = set().union(*map(_options, files))
        asked = re.findall(r"(?<=\s)--[a-z][\w-]*", rest.split("|")[0])
        assert set(asked) <= options, module


def test_every_experiment_is_on_a_page():
    text = "".join(_joined(page) for page in PAGES)
    for path in (ROOT / "docs" / "experiments").glob("*.py"):
        if "__main__" in path.read_text():
            assert f"docs.experiments.{path.stem}" in text, path.stem


@each_page
def test_pictures_are_used_and_exist(page):
    for name in re.findall(r"_static/([\w.-]+\.png)", page.read_text()):
        assert (ROOT / "docs" / "_static" / name).exists(), name


def test_no_picture_is_left_over():
    text = "".join(page.read_text() for page in PAGES)
    for path in (ROOT / "docs" / "_static").glob("*.png"):
        assert f"_static/{path.name}" in text, path.name
