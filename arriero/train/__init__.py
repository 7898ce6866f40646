"""Recipes over one loop."""
