"""Tasks run: the worker, the executors of this machine, and what holds them to their memory and their pace."""
