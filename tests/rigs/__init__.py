"""Real servers on loopback that tests and benchmarks run against."""
