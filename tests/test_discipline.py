"""The rules of the house, which nothing in Equinox enforces."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import tomllib

import equinox as eqx
import eqx_hpo as hpo
import pytest

from .conftest import LONG_VARIANTS


ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "eqx_hpo"
PUBLIC = sorted(
    name
    for name in vars(hpo)
    if not name.startswith("_") and not inspect.ismodule(getattr(hpo, name))
)


def _modules() -> list[type[eqx.Module]]:
    found = set()
    for info in pkgutil.walk_packages(hpo.__path__, "eqx_hpo."):
        for value in vars(importlib.import_module(info.name)).values():
            if (
                inspect.isclass(value)
                and issubclass(value, eqx.Module)
                and value.__module__.startswith("eqx_hpo.")
            ):
                found.add(value)
    return sorted(found, key=lambda cls: cls.__name__)


MODULES = _modules()
named = pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)


def _own_bases(cls):
    return [base for base in cls.__mro__[1:] if base.__module__.startswith("eqx_hpo.")]


@named
def test_abstract_or_final(cls):
    subclasses = [sub for sub in MODULES if sub is not cls and issubclass(sub, cls)]
    if not cls.__name__.startswith("Abstract"):
        assert subclasses == []
    else:
        assert inspect.isabstract(cls)


@named
def test_no_concrete_method_is_overridden(cls):
    for name, value in vars(cls).items():
        if not callable(value) or name.startswith("__"):
            continue
        for base in _own_bases(cls):
            if name in vars(base):
                assert getattr(vars(base)[name], "__isabstractmethod__", False), name


@named
def test_fields_not_properties_and_in_one_class(cls):
    assert not [name for name, x in vars(cls).items() if isinstance(x, property)]
    if cls.__name__.startswith("Abstract"):
        assert dataclasses.fields(cls) == ()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring(name):
    assert len(inspect.getdoc(getattr(hpo, name)) or "") > 20


def _documented(doc: str) -> list[str]:
    section = doc.partition("**Arguments:**")[2]
    section = re.split(r"\n\*\*", section)[0]
    names = []
    for line in section.splitlines():
        if line.startswith("- `"):
            names += re.findall(r"`(\w+)`", line.partition(":")[0])
    return names


def _functions():
    for name in PUBLIC:
        value = getattr(hpo, name)
        if inspect.isclass(value):
            for method, fn in vars(value).items():
                public = method == "__init__" or not method.startswith("_")
                if public and callable(fn) and "**Arguments:**" in (fn.__doc__ or ""):
                    yield f"{name}.{method}", fn
        elif "**Arguments:**" in (value.__doc__ or ""):
            yield name, value


def _inherited(doc: str) -> list[str]:
    """The attributes of the classes whose arguments a docstring refers to."""
    names = []
    for cls in re.findall(r"those of\s+\[`eqx_hpo\.(\w+)`\]", doc):
        attributes = inspect.getdoc(getattr(hpo, cls)) or ""
        section = attributes.partition("**Attributes:**")[2]
        names += re.findall(r"^- `(.+?)`", section, re.M)
        names += _inherited(attributes)
    return [name for x in names for name in re.findall(r"\w+", x)]


@pytest.mark.parametrize("name, fn", list(_functions()))
def test_documented_arguments_are_the_signature(name, fn):
    doc = inspect.getdoc(fn) or ""
    parameters = [p for p in inspect.signature(fn).parameters if p != "self"]
    documented, inherited = _documented(doc), _inherited(doc)
    for method in re.findall(r"those of `(\w+)`", doc):
        owner = getattr(hpo, name.partition(".")[0])
        signature = inspect.signature(getattr(owner, method))
        inherited += list(signature.parameters)
    assert set(documented) <= set(parameters)
    if inherited:
        assert set(parameters) <= {*documented, *inherited}
    else:
        assert sorted(documented) == sorted(parameters)


def _algorithms():
    names = [name for name in PUBLIC if inspect.isclass(getattr(hpo, name))]
    classes = [getattr(hpo, name) for name in names]
    return [
        cls
        for cls in classes
        if issubclass(cls, hpo.AbstractBilevelOptimizer) and not inspect.isabstract(cls)
    ]


@pytest.mark.parametrize("cls", _algorithms(), ids=lambda cls: cls.__name__)
def test_algorithms_document_their_arguments_and_their_source(cls):
    assert "**Arguments:**" in (cls.__init__.__doc__ or "")
    is_named = re.search(r"\d{4}", inspect.getdoc(cls) or "")
    assert is_named or cls is hpo.FirstOrder


def test_no_super():
    for path in PACKAGE.rglob("*.py"):
        assert "super()" not in path.read_text(), path


def test_each_public_name_is_in_exactly_one_api_page():
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    listed = [
        n for page in pages for n in re.findall(r"^::: eqx_hpo\.(\w+)$", page, re.M)
    ]
    listed += [
        n for page in pages for n in re.findall(r"^ +::: eqx_hpo\.(\w+)$", page, re.M)
    ]
    assert sorted(listed) == PUBLIC


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_sizes(path):
    """Habits: far more than these is a sign that a file or a function has two jobs."""
    source = path.read_text()
    assert source.count("\n") <= 450
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno - doc.count("\n")
            assert length <= 60, node.name
    assert "equinox.internal" not in source


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") < 110


def _imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names


def test_what_is_imported_is_required_and_no_more():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split("[<>=]", x)[0] for x in project["dependencies"]}
    found = set().union(*[_imported(path) for path in PACKAGE.rglob("*.py")])
    extras = {"matplotlib", "optuna", "orbax", "tensorstore"}
    assert found - extras == required


def test_actions_are_pinned_by_commit():
    uses = [
        line.partition("uses: ")[2]
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text().splitlines()
        if "uses: " in line
    ]
    assert len(uses) > 10
    for action in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


def test_the_command_of_the_tests_is_one_everywhere():
    lines = (ROOT / "README.md").read_text().splitlines()
    (command,) = [line for line in lines if line.endswith("pytest --cov -n auto")]
    assert f'"{command}"' in (ROOT / ".ci" / "run").read_text()
    workflow = ROOT / ".github" / "workflows" / "tests.yml"
    assert f"- run: {command}\n" in workflow.read_text()


def test_long_variants_are_of_tests_that_exist():
    for entry in LONG_VARIANTS:
        file, _, rest = entry.partition("::")
        name, bracket, _ = rest.partition("[")
        assert bracket
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), entry


@pytest.mark.parametrize("name", ["T1T2", "MetaLearner", "Evolution"])
@pytest.mark.parametrize("method", ["init", "step", "compute_hypergradient", "restart"])
def test_methods_have_the_text_of_the_interface(name, method):
    text = inspect.getdoc(getattr(hpo.AbstractBilevelOptimizer, method))
    assert text and inspect.getdoc(getattr(getattr(hpo, name), method)) == text
