"""GradSharding can wrap a strategy that uses the clients' arrays for a weighted mean, and for nothing else."""

from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from gradsharding.errors import UserError

_SERVER_STEP = {kind.aggregate_train for kind in (FedAvgM, FedAdagrad, FedAdam, FedYogi)}
"""The ``aggregate_train`` of strategies that take a weighted mean and then a server step."""

_REASONS = {
    "Krum": "it selects clients by the distances between whole updates",
    "MultiKrum": "it selects clients by the distances between whole updates",
    "Bulyan": "it selects clients by the distances between whole updates",
    "QFedAvg": "it weighs each client by the norm of its whole update",
    "FedMedian": "it takes a median, not a weighted mean",
    "FedTrimmedAvg": "it takes a trimmed mean, not a weighted mean",
    "FedXgbBagging": "it joins trees, not arrays",
    "FedXgbCyclic": "it passes one client's trees on, and averages nothing",
    "DifferentialPrivacyServerSideFixedClipping": "the server must clip each whole update",
    "DifferentialPrivacyServerSideAdaptiveClipping": "the server must clip each whole update",
    "DifferentialPrivacyClientSideFixedClipping": "it changes the average on the server; clip and add noise in the ClientApp's own mods",
    "DifferentialPrivacyClientSideAdaptiveClipping": "it changes the average on the server; clip and add noise in the ClientApp's own mods",
}


def needs_arrays(inner: Strategy) -> bool:
    """Whether ``inner`` takes a server step, which needs the average in memory; raise UserError if it cannot be wrapped.

    FedAvg, FedProx and subclasses that do not override ``aggregate_train`` need no array on the server.
    """
    reasons = [_REASONS[kind.__name__] for kind in type(inner).__mro__ if kind.__name__ in _REASONS]
    name = type(inner).__name__
    if reasons:
        raise UserError(f"{name} cannot be sharded: {reasons[0]}; use it without GradSharding")
    if isinstance(inner, FedAvg):
        step = type(inner).aggregate_train
        if step is FedAvg.aggregate_train:
            return False
        if step in _SERVER_STEP:
            return True
    raise UserError(
        f"{name} has an aggregate_train of its own, which may use more than the weighted mean; "
        "wrap FedAvg, FedProx, FedAvgM, FedAdam, FedYogi or FedAdagrad"
    )
