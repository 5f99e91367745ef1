"""A network path that, like NAT, forgets silent connections: from then on it drops their packets without telling either end.

It uses the kernel's TCP and a TUN device. Packets sent to one address of the device come back as if sent from there to the other, so all
packets, TCP's probes included, pass through this process, which forwards or drops them.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
import time
from typing import Any, Self
from urllib.parse import urlsplit

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFADDR, _SIOCSIFDSTADDR, _SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8916, 0x8918, 0x8913, 0x8914, 0x0001


def nat_missing() -> str | None:
    """Say why no such path can be made here; None if one can."""
    try:
        ForgetfulNat("http://127.0.0.1:1", 1).close()
    except OSError as error:
        return f"no network device may be made here ({error}); it takes root and /dev/net/tun"
    return None


class ForgetfulNat:
    """A path to ``endpoint``, an HTTP server on loopback, which forgets a connection after ``seconds`` of silence.

    Raise OSError where no network device may be made.
    """

    def __init__(self, endpoint: str, seconds: float) -> None:
        self.seconds = seconds
        self.forgotten = 0
        """Number of connections that sent packets after they were forgotten."""
        self.probes = 0
        """Number of packets without data on connections that were silent for at least half a second."""
        self._target = urlsplit(endpoint)
        self._heard: dict[frozenset[int], float] = {}
        self._lost = set[frozenset[int]]()
        self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._device)
            answer = fcntl.ioctl(self._device, _TUNSETIFF, struct.pack("16sH22x", b"forget%d", _IFF_TUN | _IFF_NO_PI))
            name = answer[:16].rstrip(b"\0")
            number = int(name.removeprefix(b"forget"))
            self._near, far = (f"198.18.{number % 256}.{last}" for last in (1, 2))  # a network for tests of networks: RFC 2544
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                for request, address in ((_SIOCSIFADDR, self._near), (_SIOCSIFDSTADDR, far)):
                    fcntl.ioctl(control, request, struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(address)))
                flags = struct.unpack("16sH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", name)))[1]
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))
            self._entry = stack.enter_context(socket.socket())
            self._entry.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)  # reached from this device alone
            self._entry.bind((self._near, 0))
            self._entry.listen(64)
            self._stop, self._stopped = (stack.enter_context(end) for end in socket.socketpair())
            self._closing = stack.pop_all()
        self._thread = threading.Thread(target=self._serve, name="nat", daemon=True)
        self.endpoint = f"http://{far}:{self._entry.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"x")
        self._thread.join()
        self.close()

    def close(self) -> None:
        """Remove the device."""
        self._closing.close()

    def _serve(self) -> None:
        """Handle packets and connections, one after another, until stopped."""
        ends: list[Any] = [self._device, self._entry, self._stopped]
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select(ends, [], [])
                if self._stopped in ready:
                    return
                if self._device in ready:
                    self._forward(bytearray(os.read(self._device, 1 << 16)))
                if self._entry in ready:
                    near, _ = self._entry.accept()
                    far = socket.create_connection((self._target.hostname, self._target.port))
                    threading.Thread(target=_join, args=(near, far), name="nat-relay", daemon=True).start()

    def _forward(self, packet: bytearray) -> None:
        """Return a packet with its addresses swapped, which keeps all checksums valid; or drop it."""
        if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP and self._remembers(packet):
            packet[12:16], packet[16:20] = packet[16:20], packet[12:16]
            os.write(self._device, packet)

    def _remembers(self, packet: bytearray) -> bool:
        header = 4 * (packet[0] & 15)
        ports = frozenset(struct.unpack_from("!HH", packet, header))
        data = len(packet) - header - 4 * (packet[header + 12] >> 4)
        begins, now = packet[header + 13] & 0x02, time.monotonic()
        if not begins and ports not in self._heard:  # of a connection through an earlier device of this address
            return False
        silent = 0.0 if begins else now - self._heard[ports]
        if silent > self.seconds or (ports in self._lost and not begins):
            self.forgotten += ports not in self._lost
            self._lost.add(ports)
            return False
        self._lost.discard(ports)
        self.probes += not data and silent >= 0.5
        self._heard[ports] = now
        return True


def _join(*ends: socket.socket) -> None:
    """Copy bytes both ways until either end closes."""
    other = dict(zip(ends, reversed(ends), strict=True))
    with ends[0], ends[1], contextlib.suppress(OSError):
        while True:
            for ready in select.select(ends, [], [])[0]:
                if not (data := ready.recv(1 << 16)):
                    return
                other[ready].sendall(data)
