"""Measuring a model: perplexity on text, generated answers against references, and two models side by side."""
