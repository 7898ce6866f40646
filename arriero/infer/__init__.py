"""The inference engine: requests in, events out; sampling, structured output, speculation."""
