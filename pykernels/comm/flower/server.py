"""The server's side: a strategy of messages (``flwr.serverapp``) whose clients compress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.server.strategy import Strategy as FitStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from pykernels.comm.flower.client import only
from pykernels.comm.flower.fit import DecompressFit
from pykernels.comm.flower.payload import Arrays, Update, clipping_norm, decode, mean, numpy, read
from pykernels.comm.stats import Stats


@dataclass(frozen=True)
class _Reply:
    """A client's answer: where its arrays stand, what they are, its other records, and to what norm it was to clip."""

    key: str
    update: Update
    others: dict[str, Any]
    norm: float | None = None

    def content(self, arrays: ArrayRecord) -> RecordDict:
        """The reply's, as it would have been without the mod."""
        return RecordDict({**self.others, self.key: arrays})


def _reply(content: RecordDict, before: Arrays, norm: float | None = None) -> _Reply:
    """What a client that was sent `before` answers.

    Raises:
        ValueError: it is not what :func:`compress` makes of such arrays.
    """
    key, record = only(content, "a reply")
    if len(record) != 1:
        raise ValueError(f"the reply has {len(record)} arrays, a payload is one")
    payload = next(iter(record.values()))
    update = read(payload.data, payload.stype, before)
    return _Reply(key, update, {name: value for name, value in content.items() if name != key}, norm)


def _decoded(reply: _Reply) -> RecordDict:
    """The reply's content as it would have been without the mod.

    Raises:
        ValueError: a value is not finite.
    """
    return reply.content(_record(decode(reply.update, reply.norm)))


def _record(arrays: Arrays) -> ArrayRecord:
    """The record of `arrays`, which are let go one by one: a record holds copies."""
    return ArrayRecord({name: Array(arrays.pop(name)) for name in list(arrays)})


def _weights(replies: list[_Reply], key: str) -> list[float] | None:
    """Of each reply in the mean, as Flower takes them of the metric `key`; None: metrics that it would refuse."""
    weights: list[float] = []
    for reply in replies:
        records = [record for record in reply.others.values() if isinstance(record, MetricRecord)]
        weight = records[0].get(key) if len(records) == 1 else None
        if not isinstance(weight, int | float):
            return None
        weights.append(weight)
    return weights


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
    a reply with an error, which strategies count and pass over; it says which node sent it. Where the strategy has told
    clients to clip what they change (differential privacy), what was decoded is clipped to the same norm.

    Args:
        strategy: any of ``flwr.serverapp.strategy``, wrappers for differential privacy as well; of one of the older
            ``flwr.server.strategy`` this makes a :class:`~pykernels.comm.flower.fit.DecompressFit`.

    Raises:
        TypeError: `strategy` is neither, or a Decompress.
    """

    def __new__(cls, strategy: Any) -> Any:
        if isinstance(strategy, FitStrategy):
            return DecompressFit(strategy)
        return super().__new__(cls)

    def __init__(self, strategy: Any) -> None:
        if not isinstance(strategy, Strategy) or isinstance(strategy, Decompress):
            raise TypeError(
                f"pykernels: strategy must be one of flwr.serverapp.strategy or flwr.server.strategy, not "
                f"{type(strategy).__name__}"
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
            only(message.content, "a message")
        self._sent = {message.metadata.dst_node_id: message.content for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._stats.steps += 1
        known: dict[int, Arrays] = {}
        answers = [self._read(reply, known) for reply in replies]
        if getattr(self.strategy.aggregate_train, "__func__", None) is FedAvg.aggregate_train:
            good = [answer for _, answer in answers if answer is not None]
            found = mean([answer.update for answer in good], _weights(good, self.strategy.weighted_by_key))
            if found is not None and all(answer.norm is None for answer in good):
                for answer in good:
                    answer.update.count(self._stats)
                _, metrics = self.strategy.aggregate_train(
                    server_round,
                    [
                        reply if answer is None else _answer(reply, answer.content(ArrayRecord()))
                        for reply, answer in answers
                    ],
                )
                return _record(found), metrics
        return self.strategy.aggregate_train(server_round, [self._decode(*one) for one in answers])

    def _read(self, reply: Message, known: dict[int, Arrays]) -> tuple[Message, _Reply | None]:
        """The reply and what it holds, or an error. `known`: arrays of records that were sent, by the record's id."""
        if reply.has_error():
            return reply, None
        try:
            sent = self._sent.get(reply.metadata.src_node_id)
            if sent is None:
                raise ValueError("it was sent nothing in this round")
            _, record = only(sent, "a message")
            if id(record) not in known:
                known[id(record)] = numpy(record)
            norms = [norm for told in sent.config_records.values() if (norm := clipping_norm(told)) is not None]
            return reply, _reply(reply.content, known[id(record)], min(norms, default=None))
        except ValueError as error:
            return _refused(reply, error), None

    def _decode(self, reply: Message, answer: _Reply | None) -> Message:
        if answer is None:
            return reply
        try:
            content = _decoded(answer)
        except ValueError as error:
            return _refused(reply, error)
        answer.update.count(self._stats)
        return _answer(reply, content)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()
