"""Training data: file formats, tokenised conversations, token shards, packing, mixtures, and batches."""
