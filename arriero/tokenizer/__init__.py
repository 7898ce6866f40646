"""Tokenizers and chat templates: text to ids and back, and which ids a model learns from."""

from arriero.tokenizer.base import Tokenizer
from arriero.tokenizer.load import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
