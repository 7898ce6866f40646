"""Checkpoints: reading and writing models in every layout, and the checkpoints of a training run."""
