"""Annotations in signatures as their author wrote them, not as Python prints them."""

import re

import griffe


# What is printed, and what is meant.
_FORMS = [
    (r"\b([a-z_]\w*\.)+(?=[A-Z])", ""),  # modules
    (r"Key\[Array, ''\], UInt32\[Array, 2\], UInt32\[Array, 4\]", "PRNGKeyArray"),
    (r"Union\[Array, numpy\.ndarray, [^\[\]]*\]", "ArrayLike"),
    (r"Union\[(\w+)\]", r"\1"),
    (r"Union\[(\w+|Literal\[[^\]]*\]), (\w+)\]", r"\1 | \2"),
    (r"\bNoneType\b", "None"),
]


def _tidy(annotation):
    if annotation is None:
        return None
    text = str(annotation)
    for printed, meant in _FORMS:
        text = re.sub(printed, meant, text)
    return text


class Annotations(griffe.Extension):
    def on_function(self, *, func, **kwargs):
        for parameter in func.parameters:
            parameter.annotation = _tidy(parameter.annotation)
        func.returns = _tidy(func.returns)
