"""Configurations: frozen dataclasses, read from and written to TOML (or read from JSON), and changed by field name.

A configuration is plain data: the dataclass defines which keys exist, their types, and (in the string under each field)
their documentation. A file may omit whatever keeps its default. Every error names the key, the value, what was
expected, and the file and line where known. Ranges are checked by the dataclasses themselves on construction. No torch
here.

However a configuration is built (from a file, from flags or in Python), `settle` is called first: it expands "~" in
paths, and refuses numbers that are not finite. TOML has no null: None is written and read as the string "none".
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
