"""AWS Lambda as an executor: the caller's side, and the handler that runs in a function."""
