"""Frozen dataclasses to and from TOML (or JSON), and changes by name.

A configuration is plain data: the dataclass says which keys exist, of what type, and (in the string under each
field) what they mean. The file may leave out whatever keeps its default. Every refusal names the key, the
value, what was expected, and the file and line where that is known; the ranges are the dataclasses' own business,
checked when they are built. No torch here.

What a configuration does first when it is built, from a file, from flags or in Python, is `settle`: it expands "~" in
paths, and refuses numbers that are none. None has no TOML form: it is written and read as the string "none".
"""

from arriero.settings.build import from_dict
from arriero.settings.fields import field_docs, field_paths
from arriero.settings.override import apply_overrides
from arriero.settings.read import load, load_recipe
from arriero.settings.settle import settle
from arriero.settings.types import is_table_list
from arriero.settings.write import RECIPE, to_dict, to_toml

__all__ = [
    "RECIPE",
    "apply_overrides",
    "field_docs",
    "field_paths",
    "from_dict",
    "is_table_list",
    "load",
    "load_recipe",
    "settle",
    "to_dict",
    "to_toml",
]
