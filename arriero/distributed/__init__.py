"""What wraps the model from outside."""
