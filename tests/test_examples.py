"""Each example runs as a user runs it, and prints what its page says it prints."""

import os
import pathlib
import re
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
FAST = ("quickstart",)


def _page_of(script):
    return ROOT / "docs" / "examples" / (script.stem.replace("_", "-") + ".md")


def _promised(script):
    return re.findall(r"^```text\n(.*?)^```", _page_of(script).read_text(), re.M | re.S)


def _split(text):
    """The words, and the numbers between them."""
    number = r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)"
    words = re.sub(r"\s+", " ", re.sub(number, "#", text)).strip()
    return words, [float(x.replace("−", "-")) for x in re.findall(number, text)]


def _parametrise(script):
    marks = [pytest.mark.slow] * (script.stem not in FAST)
    return pytest.param(script, id=script.stem, marks=marks)


def test_numbers_are_compared():
    words, numbers = _split("16 decays:  0.061\ngrid −2.5, 3")
    assert words == "# decays: # grid #, #" and numbers == [16, 0.061, -2.5, 3]


@pytest.mark.parametrize("script", [_parametrise(x) for x in SCRIPTS])
def test_prints_what_its_page_says(script, tmp_path):
    env = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    for name in ("JAX_ENABLE_X64", "XLA_FLAGS"):  # of the tests, not of a user
        env.pop(name, None)
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    (words, numbers), (promised, expected) = map(
        _split, (result.stdout, _promised(script)[0])
    )
    assert words == promised
    # Another machine adds up in another order.
    assert numbers == pytest.approx(expected, rel=0.02, abs=0.005)
    figures = [path.name for path in tmp_path.glob("*.png")]
    assert figures == [f"{script.stem}.png"]
    assert (tmp_path / figures[0]).stat().st_size > 10_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: x.stem)
def test_is_short_and_on_its_page(script):
    source, page = script.read_text(), _page_of(script).read_text()
    assert source.count("\n") <= 100
    assert "argparse" not in source and "__main__" not in source
    shown = re.findall(rf'--8<-- "examples/{script.name}(?::(\w+))?"', page)
    assert shown and f"examples/{script.name}" in page
    for section in filter(None, shown):
        assert f"# --8<-- [start:{section}]" in source
    assert len(_promised(script)) == 1 and "](../_static/" in page
