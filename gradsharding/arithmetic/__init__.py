"""How the inputs of a slice become one: rules, their accumulators, the fold, weights. Nothing here does I/O."""
