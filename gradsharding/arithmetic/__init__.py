"""How a slice's inputs become one: weights, sums, exact sums, the fold. Nothing here does I/O."""
