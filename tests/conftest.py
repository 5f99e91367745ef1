"""What all tests share."""

import os

import pytest
from hypothesis import settings

# Flower reads these when it is first imported: tests report to nobody.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

pytest.register_assert_rewrite("gradsharding.testing")

# A loaded machine is slow, not wrong: no example has a deadline.
settings.register_profile("gradsharding", deadline=None)
settings.load_profile("gradsharding")


def pytest_configure(config: pytest.Config) -> None:
    """Let Flower's own dependencies be as they are: typer uses what click 8.2 deprecates."""
    config.addinivalue_line("filterwarnings", r"ignore:'click\.:DeprecationWarning:typer")


@pytest.fixture
def flower_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture Flower's log from INFO on."""
    caplog.set_level("INFO", logger="flwr")
    return caplog
