"""Scaling laws: how large a model, on how many tokens, for a given amount of compute; a sweep, its fit, and a plan."""
