"""The Llama decoder: configuration, attention, cache, LoRA."""
