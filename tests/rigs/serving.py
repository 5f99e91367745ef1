"""An HTTP server in a thread of this process ends as soon as its context is left."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

POLL = 0.02
"""Seconds until a server notices that it should end; by default that takes half a second."""


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Answer requests in a thread; give the server's URL, of HTTP. Leaving the context closes the server."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL,), name="server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
