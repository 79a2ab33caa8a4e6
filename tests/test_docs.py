"""Every Python block of the README and of the docs runs, page by page."""

import difflib
import pathlib
import re
import textwrap

import jax
import pytest


ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages that train for long.
LONG = [
    "docs/examples/learning-rates.md",
    "docs/examples/model-parts.md",
    "docs/getting-started.md",
]


def _blocks(page, language="python"):
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    found = re.findall(pattern, page.read_text(), re.M | re.S)
    return [textwrap.dedent(block) for _, block in found]


def _parametrise(page):
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in LONG))


@pytest.mark.parametrize(
    "page", [_parametrise(page) for page in PAGES if _blocks(page)]
)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    with jax.enable_x64(False):  # as a reader has it
        for block in _blocks(page):
            exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        printed = _blocks(page, "text")
        numbers = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
        got = numbers(capsys.readouterr().out)
        expected = numbers(printed[0])
        assert got[: len(expected)] == pytest.approx(expected, rel=0.01)


def test_the_example_of_the_readme_has_15_lines():
    first = _blocks(ROOT / "README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


def test_the_tutorial_runs_with_few_steps():
    namespace = {"__name__": "docs"}
    with jax.enable_x64(False):
        for block in _blocks(ROOT / "docs" / "getting-started.md"):
            few = re.sub(r"(range\(|steps=)\d+", r"\g<1>5", block)
            exec(compile(few, "getting-started.md", "exec"), namespace)


def test_the_diff_of_the_tutorial_is_that_of_its_scripts():
    page = ROOT / "docs" / "getting-started.md"
    before, after, *_ = [block.splitlines() for block in _blocks(page)]
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[3:]
    expected = ["" if line.startswith("@@") else line.rstrip() for line in lines]
    assert _blocks(page, "diff")[0].splitlines() == expected
