"""A fleet of devices: servers that TVM's tracker hands out, one session at a time."""

from __future__ import annotations

import select
import socket
import struct
from collections import Counter
from contextlib import closing
from typing import Any, Final

from grape_compile.errors import GrapeError
from grape_compile.kernels.tensorir.bench import Server, rpc

#: Seconds in which a tracker answers, and between two looks at whether a device is left to wait for.
ANSWER: Final = 10.0
LOOK: Final = 2.0


class Fleet:
    """The devices that a tracker knows by one key; without a key, by the only one there is.

    Raises GrapeError where no tracker answers, and where it knows no such device.
    """

    def __init__(self, tracker: str, key: str = "") -> None:
        self.tracker = tracker
        host, _, port = tracker.rpartition(":")
        if not host or not port.isdecimal():
            raise GrapeError("a tracker", repr(tracker), 'its address and port, as "192.168.0.2:9190"')
        self._address = (host, int(port))
        known = self._known()
        if not key and len(known) == 1:
            (key,) = known
        if key not in known:
            raise GrapeError(
                f"tune on the devices {repr(key) + ' ' if key else ''}of {tracker}",
                f"servers by key: {', '.join(f'{name} ({count})' for name, count in known.items()) or 'none'}",
                f"python -m tvm.exec.rpc_server --tracker {tracker} --key {key or 'NAME'} on each device",
            )
        self.key = key

    def __len__(self) -> int:
        return self._known()[self.key]

    def take(self) -> Server:
        """Wait for a device that is free and take it for one session.

        Raises GrapeError when none is left to wait for.
        """
        with closing(self._connection()) as connection:
            rpc.base.sendjson(connection, [rpc.base.TrackerCode.REQUEST, self.key, "", 1])
            while not select.select([connection], [], [], LOOK)[0]:
                if not len(self):
                    raise GrapeError(
                        f"a device {self.key!r} of {self.tracker}",
                        "none is left",
                        "start its servers again and call again: finished trials are recorded and are not repeated",
                    )
            host, port, key = _answer(connection)
            return Server(str(host), int(port), str(key))

    def _known(self) -> Counter[str]:
        with closing(self._connection()) as connection:
            rpc.base.sendjson(connection, [rpc.base.TrackerCode.SUMMARY])
            servers = _answer(connection)["server_info"]
        return Counter(str(each["key"]).removeprefix("server:") for each in servers)

    def _connection(self) -> socket.socket:
        try:
            connection = socket.create_connection(self._address, timeout=ANSWER)
            connection.sendall(struct.pack("<i", rpc.base.RPC_TRACKER_MAGIC))
            (magic,) = struct.unpack("<i", rpc.base.recvall(connection, 4))
        except OSError as failure:
            raise self._no_tracker(str(failure)) from failure
        if magic != rpc.base.RPC_TRACKER_MAGIC:
            raise self._no_tracker("what answers there is none")
        return connection

    def _no_tracker(self, found: str) -> GrapeError:
        host, port = self._address
        return GrapeError(
            f"the tracker {self.tracker}",
            found,
            f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port} --port-end {port + 1} on {host}",
        )


def _answer(connection: socket.socket) -> Any:
    code, value = rpc.base.recvjson(connection)
    if code != rpc.base.TrackerCode.SUCCESS:
        raise GrapeError("an answer of the tracker", repr(value), "a tracker of this release of TVM")
    return value
