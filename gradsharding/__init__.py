"""Aggregate models larger than any one function.

Each public name is imported when it is first used: a Lambda function's cold start, and ``gradsharding --help``, load only what they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "DirectoryStore": "gradsharding.stores.directory",
    "Executor": "gradsharding.running.executors",
    "FuturesExecutor": "gradsharding.running.executors",
    "GradShardingError": "gradsharding.errors",
    "InlineExecutor": "gradsharding.running.executors",
    "Limits": "gradsharding.planning.plan",
    "MemoryStore": "gradsharding.stores.memory",
    "ObjectStore": "gradsharding.stores.protocol",
    "Plan": "gradsharding.planning.plan",
    "ProcessExecutor": "gradsharding.running.processes",
    "Raw": "gradsharding.format.encode",
    "Result": "gradsharding.rounds.result",
    "Round": "gradsharding.rounds.round",
    "aggregate": "gradsharding.rounds.aggregate",
    "flat": "gradsharding.planning.topologies",
    "lambda_fl": "gradsharding.planning.topologies",
    "lifl": "gradsharding.planning.topologies",
    "open_executor": "gradsharding.running.executors",
    "open_store": "gradsharding.stores.urls",
    "sharded": "gradsharding.planning.topologies",
    "sharded_tree": "gradsharding.planning.topologies",
}
"""The module that defines each public name."""

if TYPE_CHECKING:  # the same table, as type checkers and editors read it
    from gradsharding.errors import GradShardingError
    from gradsharding.format.encode import Raw
    from gradsharding.planning.plan import Limits, Plan
    from gradsharding.planning.topologies import flat, lambda_fl, lifl, sharded, sharded_tree
    from gradsharding.rounds.aggregate import aggregate
    from gradsharding.rounds.result import Result
    from gradsharding.rounds.round import Round
    from gradsharding.running.executors import Executor, FuturesExecutor, InlineExecutor, open_executor
    from gradsharding.running.processes import ProcessExecutor
    from gradsharding.stores.directory import DirectoryStore
    from gradsharding.stores.memory import MemoryStore
    from gradsharding.stores.protocol import ObjectStore
    from gradsharding.stores.urls import open_store
else:  # a type checker that saw __getattr__ would accept any name

    def __getattr__(name: str) -> object:
        """Import a public name from its module, once."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        """List the public names, also those that are not imported yet."""
        return sorted({*globals(), *__all__})


__all__ = [
    "DirectoryStore",
    "Executor",
    "FuturesExecutor",
    "GradShardingError",
    "InlineExecutor",
    "Limits",
    "MemoryStore",
    "ObjectStore",
    "Plan",
    "ProcessExecutor",
    "Raw",
    "Result",
    "Round",
    "aggregate",
    "flat",
    "lambda_fl",
    "lifl",
    "open_executor",
    "open_store",
    "sharded",
    "sharded_tree",
]
