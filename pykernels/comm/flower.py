"""Federated learning with Flower (``flwr``, extra ``federated``): clients send what they changed through a codec.

::

    app = ClientApp(mods=[comm.flower.compress("int8")])     # outermost, before mods of differential privacy
    strategy = comm.flower.Decompress(FedAvg())              # any strategy of flwr.serverapp

A client answers a training message with its arrays less those that it was sent, encoded with error feedback: what the
codec lost stays in the client's state and is added the next time. The server adds what it decodes to the arrays that it
sent, and hands the strategy replies as if nothing had been compressed; where the strategy averages as FedAvg does, it
decodes and sums all replies in one pass instead. What a payload is: :mod:`pykernels.comm.flower_wire`. For strategies
of the older ``flwr.server`` there is :class:`DecompressFit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from pykernels.comm.flower_fit import DecompressFit
from pykernels.comm.flower_wire import FORMAT, Arrays, Update, check_alike, encode, mean
from pykernels.comm.stats import Stats
from pykernels.ops.compress import CODECS

RECORD = "pykernels"  # names of a state's records begin with it


def _only(content: RecordDict, what: str) -> tuple[str, ArrayRecord]:
    if len(content.array_records) != 1:
        raise ValueError(f"pykernels: {what} must hold one ArrayRecord, not {len(content.array_records)}")
    return next(iter(content.array_records.items()))


def _numpy(record: ArrayRecord) -> Arrays:
    if any(array.stype.startswith(FORMAT) for array in record.values()):
        raise ValueError("pykernels: compress: the reply has been compressed already: give it once, as a mod")
    return {name: np.asarray(array.numpy(), order="C") for name, array in record.items()}


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


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
        ValueError: an unknown codec; `forget_after` that is no integer of at least 1; in a message: secure aggregation
            is used as well, not one ArrayRecord came or goes, names, shapes or dtypes of what goes are not those of
            what came; `forget_after` is given and no config record says ``server-round``.
    """
    if codec not in CODECS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if forget_after is not None and (not isinstance(forget_after, int) or forget_after < 1):
        raise ValueError(f"pykernels: forget_after must be an integer of at least 1, not {forget_after!r}")

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
        check_alike(before, after)
        now = _round(message.content)
        if forget_after is not None and now is None:
            raise ValueError("pykernels: forget_after: no config record of the message says server-round")
        residuals = _residuals(context.state, now, forget_after) if error_feedback else None
        payload, kept = encode(before, after, codec, residuals)
        if error_feedback:
            context.state[f"{RECORD}.residuals"] = _record(kept)
            context.state[f"{RECORD}.round"] = ConfigRecord({"server-round": now if now is not None else 0})
        sent = Array(dtype="uint8", shape=payload.shape, stype=f"{FORMAT}.{codec}", data=payload.tobytes())
        reply.content[key] = ArrayRecord({"payload": sent})
        return reply

    return mod


def _round(content: RecordDict) -> int | None:
    for record in content.config_records.values():
        if isinstance(value := record.get("server-round"), int):
            return value
    return None


def _residuals(state: RecordDict, now: int | None, forget_after: int | None) -> Arrays:
    record = state.array_records.get(f"{RECORD}.residuals")
    if record is None:
        return {}
    since: Any = state.config_records[f"{RECORD}.round"]["server-round"]
    if forget_after is not None and now is not None and now - since > forget_after:
        return {}
    return _numpy(record)


@dataclass(frozen=True)
class _Reply:
    """A reply that can be decoded.

    Attributes:
        message: as it came.
        key: of its ArrayRecord.
        update: what that holds.
        norm: to which one client's change is clipped, if the strategy told it so.
    """

    message: Message
    key: str
    update: Update
    norm: float | None

    def answer(self, arrays: ArrayRecord) -> Message:
        """The message as it would have been without the mod."""
        content = RecordDict({**self.message.content, self.key: arrays})
        return Message(content=content, metadata=self.message.metadata)


def _shares(replies: Sequence[_Reply], key: str) -> list[float] | None:
    """Of each reply in the mean, as Flower has them of the metric `key`; None: something is wrong with the metrics."""
    weights: list[float] = []
    for reply in replies:
        records = list(reply.message.content.metric_records.values())
        weight = records[0].get(key) if len(records) == 1 else None
        if not isinstance(weight, int | float):
            return None
        weights.append(weight)
    total = sum(weights)
    return [weight / total for weight in weights] if total else None


def _clipping_norm(content: RecordDict) -> float | None:
    for record in content.config_records.values():
        if isinstance(value := record.get(KEY_CLIPPING_NORM), int | float):
            return value
    return None


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
    a reply with an error, which strategies count and pass over; it says which node sent it. Where the strategy has told
    clients to clip what they change (differential privacy), what was decoded is clipped to the same norm.

    Args:
        strategy: any of ``flwr.serverapp.strategy``, wrappers for differential privacy as well.

    Raises:
        TypeError: `strategy` is none, or a Decompress; those of the older ``flwr.server.strategy`` are
            :class:`DecompressFit`'s.
    """

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy) or isinstance(strategy, Decompress):
            raise TypeError(
                f"pykernels: strategy must be one of flwr.serverapp.strategy, not {type(strategy).__name__}; for those "
                "of flwr.server.strategy there is DecompressFit"
            )
        self.strategy = strategy
        self._stats = Stats()
        self._sent: dict[int, RecordDict] = {}  # by node, in this round

    def stats(self) -> Stats:
        """Rounds of training (`steps`), bytes of the replies' arrays decoded (`gradient_bytes`) and as they came."""
        return Stats(self._stats.steps, self._stats.gradient_bytes, self._stats.wire_bytes)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        for message in messages:
            _only(message.content, "a message")
        self._sent = {message.metadata.dst_node_id: message.content for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._stats.steps += 1
        known: dict[int, Arrays] = {}
        read = [self._read(reply, known) for reply in replies]
        if getattr(self.strategy.aggregate_train, "__func__", None) is FedAvg.aggregate_train:
            good = [one for one in read if isinstance(one, _Reply)]
            found = self._mean(good)
            if found is not None:
                for one in good:
                    one.update.count(self._stats)
                _, metrics = self.strategy.aggregate_train(
                    server_round, [one.answer(ArrayRecord()) if isinstance(one, _Reply) else one for one in read]
                )
                return _record(found), metrics
        return self.strategy.aggregate_train(server_round, [self._decode(one) for one in read])

    def _read(self, reply: Message, known: dict[int, Arrays]) -> Message | _Reply:
        """What the reply holds, or an error. `known`: arrays of records that were sent, by the record's id."""
        if reply.has_error():
            return reply
        try:
            sent = self._sent.get(reply.metadata.src_node_id)
            if sent is None:
                raise ValueError("it was sent nothing in this round")
            _, record = _only(sent, "a message")
            before = known[id(record)] if id(record) in known else known.setdefault(id(record), _numpy(record))
            key, found = _only(reply.content, "a reply")
            payload = found.get("payload")
            if payload is None or len(found) != 1 or payload.dtype != "uint8":
                raise ValueError("it was not compressed by comm.flower.compress")
            if tuple(payload.shape) != (len(payload.data),):
                raise ValueError(f"the payload has {len(payload.data)} bytes, and says {list(payload.shape)}")
            return _Reply(reply, key, Update.read(payload.stype, payload.data, before), _clipping_norm(sent))
        except ValueError as error:
            return _refused(reply, error)

    def _decode(self, one: Message | _Reply) -> Message:
        if not isinstance(one, _Reply):
            return one
        try:
            arrays = one.update.arrays(one.norm)
        except ValueError as error:
            return _refused(one.message, error)
        one.update.count(self._stats)
        return one.answer(_record(arrays))

    def _mean(self, replies: list[_Reply]) -> Arrays | None:
        """In one pass; None where only the strategy can tell what follows from decoded replies."""
        updates = [reply.update for reply in replies]
        if not updates or any(u.before is not updates[0].before or u.codec != updates[0].codec for u in updates):
            return None
        if any(reply.norm is not None for reply in replies):
            return None
        shares = _shares(replies, self.strategy.weighted_by_key)
        return None if shares is None else mean(updates, shares)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()


__all__ = ["Decompress", "DecompressFit", "compress"]
