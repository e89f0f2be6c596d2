"""Arguments written behind the name of a loss: "tdpo2:alpha=0.5, beta=0.2".

The one form that passes through a list of names in YAML or on a command line, and that gives each
of several losses its own value.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def split(text: str) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of "name" or "name:key=value, ...". Values are Python literals; a bare word
    is a string.

    Raises:
        ValueError: something else behind the colon, a key that stands there twice.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return text, {}
    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not call.keywords:
            raise ValueError("no key=value")
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            if (key := _key(keyword)) in found:
                raise ValueError(f"{key} stands there twice")
            found[key] = _value(keyword.value)
        return name.strip(), found
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"a loss with arguments is written name:key=value, key=value; got {text!r} ({error})."
        ) from None


def join(name: str, arguments: Mapping[str, Any]) -> str:
    """The text that `split` reads."""
    return f"{name}:{', '.join(f'{k}={v!r}' for k, v in arguments.items())}" if arguments else name


def _key(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("no key=value")
    return keyword.arg


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    # numbers that Python writes as words, so that they are refused as numbers
    return float(node.id) if node.id.lower() in ("nan", "inf", "infinity") else node.id
