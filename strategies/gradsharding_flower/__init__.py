"""Flower strategies whose updates do not pass through the server.

Wrap a strategy on the server, and put the mod first in the ClientApp::

    strategy = GradSharding(FedAvg(), store="file:///shared/updates")
    app = ClientApp(mods=[upload_mod])
"""

from gradsharding_flower.arrays import from_state_dict, to_state_dict
from gradsharding_flower.mod import upload_mod
from gradsharding_flower.reference import refer
from gradsharding_flower.result import RoundReport
from gradsharding_flower.strategy import GradSharding
from gradsharding_flower.trees import LIFL, LambdaFL

__all__ = ["LIFL", "GradSharding", "LambdaFL", "RoundReport", "from_state_dict", "refer", "to_state_dict", "upload_mod"]
