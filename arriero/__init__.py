"""Arriero raises Llama models."""

__version__ = "0.1.0"
