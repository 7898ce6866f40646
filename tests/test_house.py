"""The house as a whole: no circles of imports, no module without its story."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import arriero

PACKAGE = Path(arriero.__file__).parent
MODULES = {
    ".".join(("arriero", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, at its top, for its annotations, or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def test_no_module_imports_itself_by_way_of_others():
    # arriero/__init__.py names what is imported when it is first used; api.py stands above all.
    graph = {name: set(imports(path)) & set(MODULES) for name, path in MODULES.items() if name != "arriero"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_every_module_says_what_it_is_for():
    assert [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))] == []
