"""Every Python block of the README and of the docs runs, page by page. The built site
shows no innards of Python, and holds all that its pages load."""

import difflib
import html
import html.parser
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import eqx_hpo as hpo
import jax
import pytest


ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages that train for long.
LONG = [
    "docs/api/problem.md",
    "docs/api/tune.md",
    "docs/experiments/learning-rates.md",
    "docs/examples/model-parts.md",
    "docs/generalisation.md",
    "docs/getting-started.md",
    "docs/api/compare.md",
    "docs/methods.md",
    "docs/migrating.md",
    "docs/precision.md",
    "docs/saving.md",
    "docs/troubleshooting.md",
]
# Packages of the extra `logging`, which a block of docs/logging.md may import.
# By the pattern one finds what each has written.
LOGGERS = {"tensorboardX": "runs/first/events*", "wandb": "wandb/*run-*/*.wandb"}


def blocks_of(text, language="python"):
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    found = [block for _, block in re.findall(pattern, text, re.M | re.S)]
    # What is included from a script runs with the script.
    return [textwrap.dedent(block) for block in found if "--8<--" not in block]


def _parametrise(page):
    name = str(page.relative_to(ROOT))
    return pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in LONG))


def _run_blocks(page, namespace, unless):
    """Runs the blocks of a page, but for those that import a package of `unless`."""
    # In single precision, as a reader has it, unless the page asks for more.
    with jax.enable_x64("jax_enable_x64" in page.read_text()):
        for block in blocks_of(page.read_text()):
            if block.startswith("# script.py"):
                continue  # a process of its own
            if not re.search(rf"^(from|import) ({'|'.join(unless)})\b", block, re.M):
                exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [_parametrise(page) for page in PAGES if blocks_of(page.read_text())]
)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    _run_blocks(page, namespace, LOGGERS)
    if page.name == "README.md":
        printed = blocks_of(page.read_text(), "text")
        numbers = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
        got = numbers(capsys.readouterr().out)
        expected = numbers(printed[0])
        assert got[: len(expected)] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("package", LOGGERS)
def test_blocks_of_loggers_run(package, tmp_path, monkeypatch):
    pytest.importorskip(package, reason="needs the extra `logging`")
    monkeypatch.chdir(tmp_path)
    others = [x for x in LOGGERS if x != package]
    _run_blocks(ROOT / "docs" / "logging.md", {"__name__": "docs"}, others)
    (written,) = tmp_path.glob(LOGGERS[package])
    assert b"hyperparams" in written.read_bytes()


@pytest.mark.slow
def test_the_script_of_two_processes_runs(tmp_path):
    """Twice: the second time it reads the solution."""
    pytest.importorskip("orbax.checkpoint", reason="needs the extra `orbax`")
    page = ROOT / "docs" / "devices.md"
    (script,) = [x for x in blocks_of(page.read_text()) if x.startswith("# script.py")]
    (tmp_path / "script.py").write_text(script)
    commands = blocks_of(page.read_text(), "bash")[0].replace("python", sys.executable)
    for _ in range(2):
        out = subprocess.run(
            ["bash", "-c", commands + "wait"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        ).stdout
        assert "Finished after step 200." in out


@pytest.mark.slow
def test_a_saved_model_needs_no_library(tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "saving.md"
    monkeypatch.chdir(tmp_path)
    _run_blocks(page, {"__name__": "docs"}, LOGGERS)
    blocks = {x.splitlines()[0]: x for x in blocks_of(page.read_text())}
    hidden = "import sys\nfor x in ('eqx_hpo', 'optax'): sys.modules[x] = None\n"
    (tmp_path / "network.py").write_text(blocks["# network.py"])
    (tmp_path / "script.py").write_text(hidden + blocks["# script.py"])
    command = [sys.executable, "script.py"]
    served = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert float(served.stdout) == pytest.approx(float(capsys.readouterr().out))


def test_the_oldest_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "compatibility.md").read_text()
    table = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", page, re.M))
    assert ">=" + table.pop("Python") == project["requires-python"]
    listed = {f"{name.lower()}>={version}" for name, version in table.items()}
    assert listed == set(project["dependencies"])


def test_the_example_of_the_readme_has_15_lines():
    first = blocks_of((ROOT / "README.md").read_text())[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


@pytest.mark.slow
def test_the_tutorial_runs_with_few_steps():
    namespace = {"__name__": "docs"}
    with jax.enable_x64(False):
        for block in blocks_of((ROOT / "docs" / "getting-started.md").read_text()):
            few = re.sub(r"(range\(|steps=)\d+", r"\g<1>5", block)
            exec(compile(few, "getting-started.md", "exec"), namespace)


def test_the_diff_of_the_tutorial_is_that_of_its_scripts():
    page = ROOT / "docs" / "getting-started.md"
    before, after, *_ = [block.splitlines() for block in blocks_of(page.read_text())]
    lines = list(difflib.unified_diff(before, after, n=1, lineterm=""))[3:]
    expected = ["" if line.startswith("@@") else line.rstrip() for line in lines]
    assert blocks_of(page.read_text(), "diff")[0].splitlines() == expected


# What Python prints of objects and types that have no form of their own.
INNARDS = (
    r"\bat 0x[0-9a-f]+|<factory>|<class '|<function |__dataclass_|_MISSING_TYPE"
    r"|Initialize self|NoneType|Union\[|\btyping\.|\b\w+\._\w+\.\w+"
)


class _Loads(html.parser.HTMLParser):
    """Collects what a browser fetches together with a page."""

    def __init__(self, page):
        html.parser.HTMLParser.__init__(self)
        self.urls = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("a", "base", "form"):
            urls = [value for name, value in attrs if name in ("href", "src", "srcset")]
            self.urls += [url for url in urls if url]


def _check_text(page):
    text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))
    assert re.findall(INNARDS, text) == [], page
    members = re.findall(r'id="eqx_hpo\.(\w+)\.(__\w+__)"', page.read_text())
    for cls, member in members:
        assert member == "__init__", (page, cls)
        assert "**Arguments:**" in (getattr(hpo, cls).__init__.__doc__ or ""), cls


def _check_loads(page):
    for url in _Loads(page.read_text()).urls:
        if not url.startswith(("#", "data:")):
            path = url.partition("#")[0].partition("?")[0]
            assert (page.parent / path).exists(), (page, url)


def test_the_built_site(tmp_path):
    pytest.importorskip("material", reason="needs the extra `tests`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=env, cwd=ROOT)
    pages = sorted(tmp_path.rglob("index.html"))
    assert len(pages) == len(PAGES) - 1  # the README is no page
    for page in pages:
        _check_text(page)
        _check_loads(page)
    for sheet in tmp_path.rglob("*.css"):
        external = r"@import|url\([\"']?(?:https?:)?//"
        assert re.findall(external, sheet.read_text()) == [], sheet
    mathjax = tmp_path / "_static" / "mathjax"
    fonts = re.findall(
        r"%%URL%%/([\w-]+\.woff)", (mathjax / "tex-chtml.js").read_text()
    )
    assert len(set(fonts)) > 20
    for font in fonts:
        assert (mathjax / "output" / "chtml" / "fonts" / "woff-v2" / font).exists()
