"""Tensors between two processes over a socket: authenticated, never unpickled, as they lie in memory.

::

    frame    "PKL1", bytes of the head, the head, the bytes of its tensors one after another
    head     JSON: ``kind`` and what belongs to it; ``tensors``: of each [dtype, shape, channels_last], or of what is
             no tensor {"value": number or null}

A link begins with a challenge on either side (`multiprocessing.connection`'s, HMAC), so that only those who know the
key are listened to. Whoever has nothing to say sends a beat, so that silence means that the other end is gone or hangs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch

from pykernels.network.saved.literals import DTYPES

__all__ = ["KEY", "Link", "LinkError", "Server", "Silent", "checked_silence", "dial", "key_of_environment"]

KEY = "PYKERNELS_PIPELINE_KEY"  # the environment variable that holds it

_MAGIC, _HEADER = b"PKL1", struct.Struct("<4sI")
_MOST_HEAD, _MOST_BYTES, _DIMENSIONS = 2**24, 2**36, 64
_STRANGERS = 64  # that may be greeted at once
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TIME = struct.Struct("ll")  # the kernel's timeval


class LinkError(ConnectionError):
    """The other end is gone, or does not speak as it should."""


class Silent(LinkError):
    """Nothing came, not even a beat."""


def key_of_environment() -> bytes:
    """The pipeline's key.

    Raises:
        ValueError: there is none, or one of less than 16 bytes.
    """
    try:
        key = bytes.fromhex(os.environ.get(KEY, ""))
    except ValueError as error:
        raise ValueError(f"{KEY}: the environment variable must hold hexadecimal digits: {error}") from error
    if len(key) < 16:
        raise ValueError(f"{KEY}: the environment variable must hold the pipeline's key, 64 hexadecimal digits")
    return key


def checked_silence(silence: float) -> float:
    """Seconds after which a link is given up.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(silence, int | float) or not 0.1 <= silence <= 1e6:
        raise ValueError(f"silence: must be between 0.1 and a million seconds, not {silence!r}")
    return silence


class Link:
    """One end of a connection. One thread may send while another receives.

    Args:
        connection: a connected socket.
        silence: seconds without a byte after which the other end is given up.
    """

    def __init__(self, connection: socket.socket, silence: float) -> None:
        self._socket, self.silence = connection, silence
        connection.settimeout(None)
        # Of receiving alone: sending waits for as long as the other end takes.
        timeout = _TIME.pack(int(silence), int(silence % 1 * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, head: dict[str, Any], values: Sequence[Any] = ()) -> None:
        """A frame; `values`: tensors on the CPU, numbers, None.

        Raises:
            LinkError: the other end is gone.
            TypeError: a value is something else.
        """
        entries, parts = [], []
        for value in values:
            entry, part = _packed(value)
            entries.append(entry)
            if part is not None:
                parts.append(part)
        text = json.dumps({**head, "tensors": entries}, separators=(",", ":")).encode()
        try:
            self._socket.sendall(_HEADER.pack(_MAGIC, len(text)) + text)
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise LinkError(f"the connection is lost: {error}") from error

    def receive(self) -> tuple[dict[str, Any], list[Any]]:
        """The next frame that is no beat.

        Raises:
            Silent: nothing came for so long.
            LinkError: the other end is gone, or this is no frame.
        """
        while True:
            magic, size = _HEADER.unpack(self._bytes(_HEADER.size))
            if magic != _MAGIC or size > _MOST_HEAD:
                raise LinkError("what came is no frame")
            try:
                head = json.loads(self._bytes(size))
                kind, entries = head["kind"], head.pop("tensors")
                values = [self._value(entry) for entry in entries]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise LinkError(f"what came is no frame: {error}") from error
            except (RuntimeError, MemoryError) as error:  # torch's, of a tensor for which there is no memory
                raise LinkError(f"what came cannot be held: {error}") from error
            if kind != "beat":
                return head, values

    def beat(self) -> None:
        """Say that this end lives."""
        self.send({"kind": "beat"})

    def close(self) -> None:
        """Wakes whoever sends or receives on it, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _value(self, entry: Any) -> Any:
        if isinstance(entry, dict):
            value = entry["value"]
            if value is not None and type(value) not in (int, float, bool):
                raise ValueError("a value is no number")
            return value
        name, shape, last = entry
        if len(shape) > _DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("a shape is none")
        if math.prod(shape) * DTYPES[name].itemsize > _MOST_BYTES or (last and len(shape) != 4):
            raise ValueError("a tensor is none")
        layout = torch.channels_last if last else torch.contiguous_format
        value = torch.empty(shape, dtype=DTYPES[name], memory_format=layout)
        self._fill(_memory(value))
        return value

    def _bytes(self, count: int) -> bytearray:
        found = bytearray(count)
        self._fill(memoryview(found))
        return found

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                raise Silent(f"nothing came for {self.silence:g} s") from None
            except OSError as error:
                raise LinkError(f"the connection is lost: {error}") from error
            if not count:
                raise LinkError("the connection is closed")
            view = view[count:]


def _packed(value: Any) -> tuple[Any, memoryview | None]:
    if not isinstance(value, torch.Tensor):
        if value is not None and type(value) not in (int, float, bool):
            raise TypeError(f"tensors, numbers and None can be sent, not {type(value).__name__}")
        return {"value": value}, None
    if value.device.type != "cpu" or value.dtype not in _NAMES or value.layout != torch.strided:
        raise TypeError(f"a tensor of {value.dtype}, {value.layout}, on {value.device} cannot be sent")
    value = value.detach().resolve_conj().resolve_neg()
    last = value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
    value = value if last else value.contiguous()
    return [_NAMES[value.dtype], list(value.shape), last], _memory(value)


def _memory(value: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor, in the order of memory."""
    if not value.is_contiguous():
        value = value.permute(0, 2, 3, 1)
    return value.reshape(-1).view(torch.uint8).numpy().data


# --- how links come to be ---


class Server:
    """Where others come. Each is greeted in a thread of its own and for `silence` seconds at most, so that strangers
    keep nobody waiting; when there are too many, the one that has been greeted longest is sent away.

    Args:
        address: a path, or ``host:port``.
        key: those who know it are let in.

    Raises:
        ValueError: the address is neither.
        OSError: it cannot be had.
    """

    def __init__(self, address: str, key: bytes, silence: float) -> None:
        self._key, self._silence = key, silence
        self._socket = _listening(address)
        self._came: queue.Queue[Link | None] = queue.Queue()
        self._strangers: deque[socket.socket] = deque()
        threading.Thread(target=self._listen, name="pykernels server", daemon=True).start()

    def accept(self, within: float | None = None) -> Link | None:
        """Who came last and is still unheard; None where nobody came within so many seconds, or it is closed."""
        try:
            link = self._came.get(timeout=within)
            while link is not None and not self._came.empty():  # whoever came again has given up the link before
                link.close()
                link = self._came.get()
        except queue.Empty:
            return None
        if link is None:
            self._came.put(None)  # for whoever asks next
        return link

    def close(self) -> None:
        """Wakes whoever waits in `accept`, too. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for stranger in list(self._strangers):
            _hang_up(stranger)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except ConnectionError:  # of one that has gone again
                continue
            except OSError:
                self._came.put(None)
                return
            self._strangers.append(connection)
            if len(self._strangers) > _STRANGERS:
                _hang_up(self._strangers[0])
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        link = _greeted(connection, self._key, self._silence, first=True)
        self._strangers.remove(connection)
        if link is not None:
            self._came.put(link)


def _listening(address: str) -> socket.socket:
    if "/" in address:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address)
        made = socket.socket(socket.AF_UNIX)
        made.bind(address)
    else:
        made = socket.create_server(host_of(address), reuse_port=False)
    made.listen(_STRANGERS)
    return made


def _hang_up(connection: socket.socket) -> None:
    """So that whoever reads it, in any thread, is at its end."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def host_of(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"address: {address!r} is neither a path nor host:port")
    return host.strip("[]"), int(port)


def dial(address: str, key: bytes, silence: float) -> Link | None:
    """A link to who listens there; None where nobody does now, or somebody with another key."""
    try:
        if "/" in address:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(silence)
                connection.connect(address)
            except OSError:
                connection.close()
                return None
        else:
            connection = socket.create_connection(host_of(address), timeout=silence)
    except OSError:
        return None
    return _greeted(connection, key, silence, first=False)


def _greeted(connection: socket.socket, key: bytes, silence: float, first: bool) -> Link | None:
    """A link, when either end has shown within `silence` seconds that it knows the key."""
    link = Link(connection, silence)
    late = threading.Timer(silence, _hang_up, [connection])
    late.daemon = True
    late.start()
    try:
        with Connection(os.dup(connection.fileno())) as greeting:
            if first:
                deliver_challenge(greeting, key)
                answer_challenge(greeting, key)
            else:
                answer_challenge(greeting, key)
                deliver_challenge(greeting, key)
    except (AuthenticationError, OSError, EOFError, AssertionError, ValueError):
        link.close()
        return None
    finally:
        late.cancel()
    return link


def dial_until(address: str, key: bytes, silence: float, seconds: float) -> Link | None:
    """`dial` again and again for so long."""
    end = time.monotonic() + seconds
    while (link := dial(address, key, silence)) is None and time.monotonic() < end:
        time.sleep(0.05)
    return link
