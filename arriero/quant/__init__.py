"""Number formats of quantised weights: each turns a matrix into codes and scales, and back."""
