"""The fields of a configuration class: their dotted names, and the documentation string under each."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from arriero.settings.types import hints


def field_paths(cls: Any) -> Iterator[str]:
    """Dotted names of all leaves of a configuration class: "optim.lr"."""
    for name, annotation in hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            yield from (f"{name}.{inner}" for inner in field_paths(annotation))
        else:
            yield name


def field_docs(cls: Any) -> dict[str, str]:
    """The documentation string under each field of a dataclass, on one line."""
    docs: dict[str, str] = {}
    bases: list[Any] = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    for base in bases:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = _string(below)
                if text is not None:
                    docs[field.target.id] = " ".join(text.split())
    return docs


def _string(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None
