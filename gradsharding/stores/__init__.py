"""Where objects lie: what a store promises, the stores of this machine, and how objects are read."""
