"""The version of the package, beside pyproject.toml's."""

__version__ = "0.1.0"
