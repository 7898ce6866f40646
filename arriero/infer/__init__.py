"""Sampling, cached decoding, and the terminal chat."""
