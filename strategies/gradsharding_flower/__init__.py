"""Flower strategies whose updates never pass through the server.

On the server, wrap a strategy; in the ClientApp, put one mod first::

    strategy = GradSharding(FedAvg(), store="file:///shared/updates")
    app = ClientApp(mods=[upload_mod])
"""

from gradsharding_flower.arrays import from_state_dict, to_state_dict
from gradsharding_flower.mod import upload_mod
from gradsharding_flower.reference import refer
from gradsharding_flower.result import RoundReport
from gradsharding_flower.strategy import LIFL, GradSharding, LambdaFL

__all__ = ["LIFL", "GradSharding", "LambdaFL", "RoundReport", "from_state_dict", "refer", "to_state_dict", "upload_mod"]
