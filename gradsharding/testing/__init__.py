"""The contracts of stores, executors and rules, as tests to inherit; stores that count, fail and delay; the mean by plain numpy.

A contract is a class for pytest. Inherit it and supply its fixture and hooks; pytest then tests each promise.
"""

from gradsharding.testing.executors import ExecutorContract, ProcessContract, Started, peak
from gradsharding.testing.reference import assert_same, reference_mean, sample_updates
from gradsharding.testing.rules import RuleContract
from gradsharding.testing.stores import StoreContract, read
from gradsharding.testing.wrappers import CountingStore, FlakyStore, SlowStore

__all__ = [
    "CountingStore",
    "ExecutorContract",
    "FlakyStore",
    "ProcessContract",
    "RuleContract",
    "SlowStore",
    "Started",
    "StoreContract",
    "assert_same",
    "peak",
    "read",
    "reference_mean",
    "sample_updates",
]
