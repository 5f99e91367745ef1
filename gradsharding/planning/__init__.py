"""What a round will do, as values: slices, tasks, plans, topologies, and what platforms allow. Nothing here runs."""
