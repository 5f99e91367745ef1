"""One federation of a model-sized round, sliced or plain."""
