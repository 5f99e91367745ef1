"""Aggregate models larger than any one function."""

from gradsharding.errors import GradShardingError
from gradsharding.format.encode import Raw
from gradsharding.planning.plan import Limits, Plan
from gradsharding.planning.topologies import flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.rounds.aggregate import Result, aggregate
from gradsharding.rounds.round import Round
from gradsharding.running.executors import Executor, FuturesExecutor, InlineExecutor, ProcessExecutor, open_executor
from gradsharding.stores.directory import DirectoryStore
from gradsharding.stores.memory import MemoryStore
from gradsharding.stores.protocol import ObjectStore
from gradsharding.stores.urls import open_store

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
__version__ = "0.1.0"
