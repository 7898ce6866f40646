"""Checkpoints: where models come from and what they are written as."""
