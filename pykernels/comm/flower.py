"""Federated learning with Flower (``flwr``, extra ``federated``): clients send what they changed through a codec.

::

    app = ClientApp(mods=[comm.flower.compress("int8")])     # outermost, before mods of differential privacy
    strategy = comm.flower.Decompress(FedAvg())              # any strategy of flwr.serverapp

A client answers a training message with its arrays less those that it was sent, encoded with error feedback: what the
codec lost stays in the client's state and is added the next time. The server adds what it decodes to the arrays that it
sent, and hands the strategy replies as if nothing had been compressed; where the strategy averages as FedAvg does, it
decodes and sums all replies in one pass instead. The server knows names, shapes and dtypes from
what it sent itself: of a reply it reads a version, a codec's name and as many bytes as these shapes take, whatever they
hold. Of floating-point arrays (float32, float16) those of one dimension travel as fp32, others through the codec;
arrays of other dtypes travel as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from pykernels import _host
from pykernels.comm.stats import Stats
from pykernels.ops.compress import CODECS, record_bytes

BLOCK, RAW_BLOCK = 256, 32  # elements of a record, where there is a scale and where there is none
RECORD = "pykernels"  # of a reply's and of a state's records
STYPE = "pykernels.1"  # how the payload is serialized: as it is. The number counts formats
DTYPES = ("float32", "float16")  # that are encoded
TOGETHER = 1 << 18  # elements that are decoded at a time, of all payloads


@dataclass(frozen=True)
class _Part:
    """Where an array lies in a payload; `codec` None: its bytes as they are."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str | None
    block: int
    first: int
    size: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def segments(self) -> np.ndarray[Any, Any]:
        return np.array([[0, self.numel, 0]], np.int64)

    def encode(self, x: np.ndarray[Any, Any], residual: np.ndarray[Any, Any] | None, payload: Any) -> None:
        assert self.codec is not None
        _host.compress_encode(x.reshape(-1), residual, payload, self.segments, self.codec, self.block)

    def decode(
        self, payloads: Sequence[np.ndarray[Any, Any]], weights: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """fp32 of `shape`: what the payloads hold, added in order, each times its weight; in one pass over them."""
        assert self.codec is not None
        out = np.zeros(self.numel, np.float32)
        record = record_bytes(self.codec, self.block)
        for begin in range(0, self.numel, TOGETHER):
            end = min(begin + TOGETHER, self.numel)
            first, last = (self.first + -(-n // self.block) * record for n in (begin, end))
            rows = np.stack([payload[first:last] for payload in payloads])
            _host.compress_decode(
                rows, out, np.array([[begin, end - begin, 0]]), self.codec, self.block, weights=weights
            )
        return out.reshape(self.shape)

    def plain(self, payload: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The array whose bytes are as they are."""
        return np.frombuffer(payload[self.first : self.first + self.size].tobytes(), self.dtype).reshape(self.shape)


def _parts(arrays: Mapping[str, np.ndarray[Any, Any]], codec: str) -> list[_Part]:
    found, end = [], 0
    for name, array in arrays.items():
        kind: str | None = None
        block = RAW_BLOCK
        size = array.nbytes
        if array.dtype.name in DTYPES:
            kind = codec if array.ndim > 1 else "fp32"
            block = BLOCK if CODECS[kind].header else RAW_BLOCK
            size = -(-array.size // block) * record_bytes(kind, block)
        found.append(_Part(name, array.shape, array.dtype, kind, block, end, size))
        end += -(-size // 4) * 4  # records lie at multiples of 4 bytes
    return found


def _size(parts: list[_Part]) -> int:
    return max((-(-(part.first + part.size) // 4) * 4 for part in parts), default=0)


def _only(content: RecordDict, what: str) -> tuple[str, ArrayRecord]:
    if len(content.array_records) != 1:
        raise ValueError(f"pykernels: {what} must hold one ArrayRecord, not {len(content.array_records)}")
    return next(iter(content.array_records.items()))


def _numpy(record: ArrayRecord) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ascontiguousarray(array.numpy()).reshape(array.shape) for name, array in record.items()}


def _check_alike(before: Mapping[str, np.ndarray[Any, Any]], after: dict[str, np.ndarray[Any, Any]]) -> None:
    """Names and shapes of a reply are those that were sent; dtypes become so, since averages of integers are float64.

    Raises:
        ValueError: they are not, or a dtype would lose something.
    """
    for name in {**before, **after}:
        came, goes = before.get(name), after.get(name)
        if came is None or goes is None or came.shape != goes.shape or not np.can_cast(goes.dtype, came.dtype):
            told, wanted = ("nothing" if x is None else f"{x.dtype} {list(x.shape)}" for x in (goes, came))
            raise ValueError(f"pykernels: {name}: the reply has {told}, {wanted} was sent")
        after[name] = goes.astype(came.dtype, copy=False)


def _refuse_secure_aggregation(*places: RecordDict) -> None:
    for place in places:
        if RECORD_KEY_CONFIGS in place or RECORD_KEY_STATE in place:
            raise ValueError(
                "pykernels: compress: not together with secure aggregation (secaggplus_mod): it sums masked integers, "
                "which no codec may change. Take one of the two"
            )


def compress(codec: str = "int8", *, error_feedback: bool = True, forget_after: int | None = None) -> Mod:
    """A client mod that sends what training changed through `codec`.

    It acts on training messages. Put it first, so that it encodes what other mods (differential privacy) leave; one
    that comes before it finds other arrays than it expects, and answers with an error.

    Args:
        codec: a name in ``pykernels.ops.compress.CODECS``.
        error_feedback: keep what was not sent in the client's state, fp32, as large as the compressed arrays.
        forget_after: rounds after which this residual is dropped. Where clients are sampled, it comes from a model that
            the others have moved on from since: it is right in sum, and late. None: it is kept.

    Raises:
        ValueError: an unknown codec; `forget_after` below 1; in a message: secure aggregation is used as well, not one
            ArrayRecord came or goes, names, shapes or dtypes of what goes are not those of what came; `forget_after`
            is given and no config record says ``server-round``.
    """
    if codec not in CODECS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if forget_after is not None and forget_after < 1:
        raise ValueError(f"pykernels: forget_after must be at least 1, not {forget_after}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != "train":
            return call_next(message, context)
        _refuse_secure_aggregation(message.content, context.state)
        _, came = _only(message.content, "a training message")
        before = _numpy(came)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        _refuse_secure_aggregation(reply.content)
        key, goes = _only(reply.content, "the reply")
        after = _numpy(goes)
        _check_alike(before, after)
        now = _round(message.content)
        if forget_after is not None and now is None:
            raise ValueError("pykernels: forget_after: no config record of the message says server-round")
        residuals = _residuals(context.state, now, forget_after) if error_feedback else {}
        parts = _parts(before, codec)
        payload = np.zeros(_size(parts), np.uint8)
        kept: dict[str, np.ndarray[Any, Any]] = {}
        for part in parts:
            place = payload[part.first : part.first + part.size]
            if part.codec is None:
                place[:] = np.frombuffer(after[part.name].tobytes(), np.uint8)
                continue
            change = after[part.name].astype(np.float32) - before[part.name].astype(np.float32)
            residual = None
            if error_feedback and part.codec == codec and codec != "fp32":
                residual = np.zeros(part.numel, np.float32)
                found = residuals.get(part.name)
                if found is not None and found.size == part.numel and found.dtype == np.float32:
                    residual[:] = found.reshape(-1)
                kept[part.name] = residual
            part.encode(change, residual, place)
        if error_feedback:
            context.state[f"{RECORD}.residuals"] = ArrayRecord({name: Array(array) for name, array in kept.items()})
            context.state[f"{RECORD}.round"] = ConfigRecord({"server-round": now if now is not None else 0})
        sent = Array(dtype="uint8", shape=payload.shape, stype=STYPE, data=payload.tobytes())
        reply.content[key] = ArrayRecord({"payload": sent})
        reply.content[RECORD] = ConfigRecord({"codec": codec})
        return reply

    return mod


def _round(content: RecordDict) -> int | None:
    for record in content.config_records.values():
        if isinstance(value := record.get("server-round"), int):
            return value
    return None


def _residuals(state: RecordDict, now: int | None, forget_after: int | None) -> dict[str, np.ndarray[Any, Any]]:
    record = state.array_records.get(f"{RECORD}.residuals")
    if record is None:
        return {}
    since: Any = state.config_records[f"{RECORD}.round"]["server-round"]
    if forget_after is not None and now is not None and now - since > forget_after:
        return {}
    return _numpy(record)


@dataclass(frozen=True)
class _Update:
    """What a reply holds: the payload, as bytes, and where the arrays lie in it."""

    key: str  # of its ArrayRecord
    codec: str
    payload: np.ndarray[Any, Any]
    parts: list[_Part]
    before: dict[str, np.ndarray[Any, Any]]  # what the client was sent
    others: dict[str, Any]  # its other records

    def content(self, arrays: ArrayRecord) -> RecordDict:
        """The reply's, as it would have been without the mod."""
        return RecordDict({**self.others, self.key: arrays})

    def count(self, stats: Stats) -> None:
        stats.gradient_bytes += sum(array.nbytes for array in self.before.values())
        stats.wire_bytes += self.payload.nbytes


def _update(content: RecordDict, before: dict[str, np.ndarray[Any, Any]]) -> _Update:
    """Of a reply to a client that was sent `before`.

    Raises:
        ValueError: it is not what :func:`compress` makes of such arrays.
    """
    key, record = _only(content, "a reply")
    config = content.config_records.get(RECORD)
    codec = None if config is None else config.get("codec")
    if not isinstance(codec, str) or codec not in CODECS:
        raise ValueError("the reply was not compressed by comm.flower.compress, or by an unknown codec")
    payload = record.get("payload")
    if payload is None or len(record) != 1 or payload.stype != STYPE or payload.dtype != "uint8":
        raise ValueError(f"the reply's arrays are no payload of format {STYPE}")
    parts = _parts(before, codec)
    if len(payload.data) != _size(parts) or tuple(payload.shape) != (_size(parts),):
        raise ValueError(f"the payload has {len(payload.data)} bytes, {codec} of these arrays takes {_size(parts)}")
    others = {name: value for name, value in content.items() if name not in (key, RECORD)}
    return _Update(key, codec, np.frombuffer(payload.data, np.uint8), parts, before, others)


def _finite(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def _decoded(update: _Update) -> RecordDict:
    """The reply's content as it would have been without the mod.

    Raises:
        ValueError: a value is not finite.
    """
    arrays: dict[str, Array] = {}
    for part in update.parts:
        if part.codec is None:
            array = part.plain(update.payload)
        else:
            before = update.before[part.name].astype(np.float32)
            array = (before + part.decode([update.payload])).astype(part.dtype)
        if not _finite(array):
            raise ValueError(f"{part.name} is not finite")
        arrays[part.name] = Array(array)
    return update.content(ArrayRecord(arrays))


def _shares(updates: Sequence[_Update], key: str) -> list[float] | None:
    """Of each reply in the mean, as Flower has them of the metric `key`; None: something is wrong with the metrics."""
    weights: list[float] = []
    for update in updates:
        records = [record for record in update.others.values() if isinstance(record, MetricRecord)]
        weight = records[0].get(key) if len(records) == 1 else None
        if not isinstance(weight, int | float):
            return None
        weights.append(weight)
    total = sum(weights)
    return [weight / total for weight in weights] if total else None


def _mean(updates: Sequence[_Update], shares: Sequence[float]) -> ArrayRecord | None:
    """What the clients were sent and the weighted mean of what they changed; None: a value is not finite.

    Shares add up to one, so this is the weighted mean of the decoded replies, in one pass over the payloads. What is
    not encoded is averaged as Flower does: integers become float64.
    """
    payloads, weights = [update.payload for update in updates], np.array(shares, np.float32)
    arrays: dict[str, Array] = {}
    for part in updates[0].parts:
        if part.codec is None:
            mean = np.asarray(sum(part.plain(p) * share for p, share in zip(payloads, shares, strict=True)))
        else:
            before = updates[0].before[part.name].astype(np.float32)
            mean = (before + part.decode(payloads, weights)).astype(part.dtype)
        if not _finite(mean):
            return None
        arrays[part.name] = Array(mean)
    return ArrayRecord(arrays)


def _answer(reply: Message, content: RecordDict) -> Message:
    return Message(content=content, metadata=reply.metadata)


def _refused(reply: Message, error: ValueError) -> Message:
    reason = f"pykernels: reply of node {reply.metadata.src_node_id}: {error}"
    return Message(error=Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), metadata=reply.metadata)


class Decompress(Strategy):
    """A strategy whose clients compress: `strategy` gets their replies decoded, and averages them as it ever does.

    Where `strategy` averages by FedAvg's own ``aggregate_train`` (FedAvg, FedProx), and all clients were sent the same
    arrays and used one codec, the replies are decoded and summed in one pass: no reply's arrays are ever there. The
    strategy then gets the replies with empty ArrayRecords (so does its ``train_metrics_aggr_fn``), checks and logs
    them and averages their metrics; the mean stands for the empty one that it returns. It is that of decoded replies
    but for rounding.

    A reply that is not what :func:`compress` sends (another version, another size, values that are not finite) becomes
    a reply with an error, which strategies count and pass over; it says which node sent it.

    Args:
        strategy: any of ``flwr.serverapp.strategy``, wrappers for differential privacy as well.

    Raises:
        TypeError: `strategy` is none (those of the older ``flwr.server.strategy`` are not).
    """

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"pykernels: strategy must be one of flwr.serverapp.strategy, not {type(strategy).__name__}"
            )
        self.strategy = strategy
        self._stats = Stats()
        self._sent: dict[int, ArrayRecord] = {}  # by node, in this round

    def stats(self) -> Stats:
        """Rounds of training (`steps`), bytes of the replies' arrays decoded (`gradient_bytes`) and as they came."""
        return Stats(self._stats.steps, self._stats.gradient_bytes, self._stats.wire_bytes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: _only(message.content, "a message")[1] for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._stats.steps += 1
        known: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        read = [self._read(reply, known) for reply in replies]
        if getattr(self.strategy.aggregate_train, "__func__", None) is FedAvg.aggregate_train:
            updates = [update for _, update in read if update is not None]
            mean = self._mean(updates)
            if mean is not None:
                for update in updates:
                    update.count(self._stats)
                _, metrics = self.strategy.aggregate_train(
                    server_round,
                    [
                        reply if update is None else _answer(reply, update.content(ArrayRecord()))
                        for reply, update in read
                    ],
                )
                return mean, metrics
        return self.strategy.aggregate_train(server_round, [self._decode(*one) for one in read])

    def _read(
        self, reply: Message, known: dict[int, dict[str, np.ndarray[Any, Any]]]
    ) -> tuple[Message, _Update | None]:
        """The reply and what it holds, or an error. `known`: arrays of records that were sent, by the record's id."""
        if reply.has_error():
            return reply, None
        try:
            sent = self._sent.get(reply.metadata.src_node_id)
            if sent is None:
                raise ValueError("it was sent nothing in this round")
            if id(sent) not in known:
                known[id(sent)] = _numpy(sent)
            return reply, _update(reply.content, known[id(sent)])
        except ValueError as error:
            return _refused(reply, error), None

    def _decode(self, reply: Message, update: _Update | None) -> Message:
        if update is None:
            return reply
        try:
            content = _decoded(update)
        except ValueError as error:
            return _refused(reply, error)
        update.count(self._stats)
        return _answer(reply, content)

    def _mean(self, updates: list[_Update]) -> ArrayRecord | None:
        """In one pass; None where only the strategy can tell what follows from decoded replies."""
        if not updates or any(u.before is not updates[0].before or u.codec != updates[0].codec for u in updates):
            return None
        shares = _shares(updates, self.strategy.weighted_by_key)
        return None if shares is None else _mean(updates, shares)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()


__all__ = ["Decompress", "compress"]
