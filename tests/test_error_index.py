"""The index of error messages quotes what the package says."""

import ast
import pathlib
import re

import eqx_hpo as hpo
import pytest


ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text()
MESSAGES = re.findall(r"^\| `` (.*?) `` \|", PAGE, re.M)


def _literals():
    """All text in the source, that between the braces of f-strings left out."""
    for path in (ROOT / "eqx_hpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


LITERALS = list(_literals())


def _fragments(message):
    return [x for x in message.split("…") if re.search(r"\w", x)]


@pytest.mark.parametrize("message", MESSAGES)
def test_quoted_messages_are_in_the_source(message):
    for fragment in _fragments(message):
        assert any(fragment.strip() in literal for literal in LITERALS), fragment


def test_each_message_is_quoted_once():
    assert len(MESSAGES) == len(set(MESSAGES)) > 40


def test_the_results_are_those_of_the_class():
    table = PAGE.partition("## Results of a run")[2]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(hpo.RESULTS._name_to_item)  # pyright: ignore
