"""Aggregate models larger than any one function."""

from gradsharding.aggregate import Result, aggregate
from gradsharding.errors import GradShardingError
from gradsharding.executor import Executor, FuturesExecutor, InlineExecutor, ProcessExecutor, open_executor
from gradsharding.plan import Limits, Plan
from gradsharding.round import Round
from gradsharding.store import DirectoryStore, MemoryStore, ObjectStore, open_store
from gradsharding.topology import flat, lambda_fl, lifl, sharded, sharded_tree
from gradsharding.update import Raw

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
