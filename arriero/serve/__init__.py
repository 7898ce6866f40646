"""Serving: HTTP APIs over the inference engine, and the page."""
