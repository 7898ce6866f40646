"""Estimates of what a training run will cost (`arriero plan`)."""
