"""Links between parts: frames, what is none, silence, and who is let in."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pykernels.parallel.link import Link, LinkError, Server, Silent, dial, dial_until

PATIENCE = 60  # seconds: whoever waits longer hangs
SILENCE = 1.0


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    one, other = (Link(end, SILENCE) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_a_frame_keeps_dtypes_shapes_and_layouts(ends: tuple[Link, Link]) -> None:
    values = [
        torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 5).t(),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([True, False]),
        None,
        7,
    ]
    one, other = ends
    one.beat()  # is passed over
    one.send({"kind": "call", "id": 3}, values)
    head, found = other.receive()
    assert head == {"kind": "call", "id": 3}
    for x, y in zip(values, found, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y)
            assert x.stride() == y.stride() or x.dim() == 2  # what is dense keeps its layout
        else:
            assert x == y


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PKL1\xff\xff\xff\xff",
        b"null",
        b"[" * 100_000,
        b'{"kind":"call"}',
        b'{"kind":"call","tensors":[1]}',
        b'{"kind":"call","tensors":[{"value":"text"}]}',
        b'{"kind":"call","tensors":[["float32",[-1],false]]}',
        b'{"kind":"call","tensors":[["object",[1],false]]}',
        b'{"kind":"call","tensors":[["float32",[99999999999,9999],false]]}',
        b'{"kind":"call","tensors":[["float32",[1],true]]}',
    ],
)
def test_what_is_no_frame_ends_the_link(sent: bytes, ends: tuple[Link, Link]) -> None:
    one, other = ends
    framed = sent if sent[:3] in (b"GET", b"PKL") else b"PKL1" + len(sent).to_bytes(4, "little") + sent
    one._socket.sendall(framed)
    with pytest.raises(LinkError, match="what came is no frame"):
        other.receive()


def test_silence_and_an_end_are_told_apart(ends: tuple[Link, Link]) -> None:
    one, other = ends
    begin = time.monotonic()
    with pytest.raises(Silent):
        other.receive()
    assert time.monotonic() - begin < 5 * SILENCE
    one.close()
    with pytest.raises(LinkError, match="closed") as raised:
        other.receive()
    assert not isinstance(raised.value, Silent)


def test_only_those_who_know_the_key_are_heard(tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    server = Server(address, b"right" * 4, SILENCE)
    assert dial(address, b"other" * 4, SILENCE) is None and server.accept(0.1) is None
    link = dial(address, b"right" * 4, SILENCE)
    found = server.accept(PATIENCE)
    assert link is not None and found is not None
    link.beat()
    link.send({"kind": "call"})
    assert found.receive() == ({"kind": "call"}, [])
    server.close()
    assert server.accept() is None and dial(address, b"right" * 4, SILENCE) is None
    with pytest.raises(ValueError, match="neither a path nor host:port"):
        Server("localhost", b"right" * 4, SILENCE)


def test_strangers_keep_nobody_waiting_and_are_sent_away(tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    server = Server(address, b"right" * 4, 2 * SILENCE)
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(100)]  # more than are greeted at once
    for number, stranger in enumerate(strangers):
        stranger.connect(address)
        with contextlib.suppress(OSError):
            stranger.send(b"\0\0\1\0" + b"#" * (number % 5))  # half an answer
    link = dial_until(address, b"right" * 4, PATIENCE, PATIENCE)
    found = server.accept(PATIENCE)
    assert link is not None and found is not None
    link.send({"kind": "call"})
    assert found.receive() == ({"kind": "call"}, [])
    begin = time.monotonic()
    with contextlib.suppress(OSError):  # a byte now and then is not enough
        while time.monotonic() - begin < PATIENCE:
            strangers[-1].send(b"#")
            time.sleep(0.1)
    assert time.monotonic() - begin < PATIENCE
    for stranger in strangers:
        stranger.close()
    server.close()


def test_what_cannot_be_held_ends_the_link(ends: tuple[Link, Link], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    one, other = ends
    one.send({"kind": "call"}, [torch.zeros(4)])
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(LinkError, match=r"what came cannot be held: .*can't allocate"):
        other.receive()
