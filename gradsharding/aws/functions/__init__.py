"""Lambda as an executor."""
