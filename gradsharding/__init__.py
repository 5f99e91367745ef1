"""Aggregate models larger than any one function.

Each public name is imported when it is first used: a Lambda function's cold start, and ``gradsharding --help``, load only what they need.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "DirectoryStore": "gradsharding.stores.directory",
    "Executor": "gradsharding.running.executors",
    "Flat": "gradsharding.planning.topologies",
    "FuturesExecutor": "gradsharding.running.executors",
    "GradShardingError": "gradsharding.errors",
    "InlineExecutor": "gradsharding.running.executors",
    "LIFLTree": "gradsharding.planning.topologies",
    "LambdaFLTree": "gradsharding.planning.topologies",
    "Limits": "gradsharding.planning.plan",
    "MemoryStore": "gradsharding.stores.memory",
    "ObjectStore": "gradsharding.stores.protocol",
    "Plan": "gradsharding.planning.plan",
    "ProcessExecutor": "gradsharding.running.processes",
    "Raw": "gradsharding.format.encode",
    "Result": "gradsharding.rounds.result",
    "Round": "gradsharding.rounds.round",
    "Sharded": "gradsharding.planning.topologies",
    "ShardedTree": "gradsharding.planning.topologies",
    "Topology": "gradsharding.planning.topologies",
    "aggregate": "gradsharding.rounds.aggregate",
    "open_executor": "gradsharding.running.executors",
    "open_store": "gradsharding.stores.urls",
}
"""The module that defines each public name."""

if TYPE_CHECKING:  # the same table, as type checkers and editors read it
    from gradsharding.errors import GradShardingError
    from gradsharding.format.encode import Raw
    from gradsharding.planning.plan import Limits, Plan
    from gradsharding.planning.topologies import Flat, LambdaFLTree, LIFLTree, Sharded, ShardedTree, Topology
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
    "Flat",
    "FuturesExecutor",
    "GradShardingError",
    "InlineExecutor",
    "LIFLTree",
    "LambdaFLTree",
    "Limits",
    "MemoryStore",
    "ObjectStore",
    "Plan",
    "ProcessExecutor",
    "Raw",
    "Result",
    "Round",
    "Sharded",
    "ShardedTree",
    "Topology",
    "aggregate",
    "open_executor",
    "open_store",
]
