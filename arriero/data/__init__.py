"""Rows: formats, tokens of conversations, shards, packing, mixtures, and the batches that a step is made of."""
