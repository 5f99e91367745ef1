"""A connection that waits for an answer is kept alive by TCP's own probes, before any network drops it.

Botocore's ``tcp_keepalive`` turns the probes on, but the system decides when they begin: after 7,200 s on Linux. AWS's NAT gateways and
network load balancers drop a connection that is silent for 350 s
(https://docs.aws.amazon.com/vpc/latest/userguide/nat-gateway-troubleshooting.html), Azure's after 240 s, many firewalls after 60 s.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies


class Probes(NamedTuple):
    """When a silent connection is probed."""

    idle: int
    """Seconds of silence before the first probe."""
    every: int
    """Seconds from one probe to the next, while none is answered."""
    most: int
    """Unanswered probes after which the connection is closed."""


PROBES = Probes(idle=20, every=20, most=9)
"""A connection is never silent for more than 20 s; a dead one is closed after 200 s."""


def options() -> list[tuple[int, int, int]]:
    """The socket options that send the probes, as far as this system has them: Linux has all, macOS has another name for the first."""
    values = {"TCP_KEEPIDLE": PROBES.idle, "TCP_KEEPALIVE": PROBES.idle, "TCP_KEEPINTVL": PROBES.every, "TCP_KEEPCNT": PROBES.most}
    supported = [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in values.items() if hasattr(socket, name)]
    return [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *supported]


def keep_alive(client: Any, ca_bundle: str | None) -> None:
    """Make a client of botocore send its requests over connections with these probes.

    Botocore lets no caller choose socket options, but a handler of ``before-send`` may send the request. This one does, by botocore's
    own HTTP session, with the same timeouts, proxies and certificates; ``ca_bundle`` is the session's.
    """
    config = client.meta.config
    settings: dict[str, Any] = {
        "verify": ca_bundle or os.environ.get("REQUESTS_CA_BUNDLE") or True,
        "proxies": config.proxies or get_environ_proxies(client.meta.endpoint_url),
        "timeout": (config.connect_timeout, config.read_timeout),
        "max_pool_connections": config.max_pool_connections,
        "socket_options": options(),
        "client_cert": config.client_cert,
        "proxies_config": config.proxies_config,
    }
    http = URLLib3Session(**settings)  # its stubs lack some parameters
    send: Callable[..., Any] = lambda request, **_: http.send(request)  # noqa: E731 - a handler gets more arguments
    client.meta.events.register("before-send", send)
