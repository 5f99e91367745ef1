"""A round from its first record to its result: submit, seal, aggregate, verify."""
