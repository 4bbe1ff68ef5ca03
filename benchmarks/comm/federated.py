"""What a Flower server needs to average a round of replies: time and memory, by the codec they came through.

    python -m benchmarks.comm.federated                # 10 clients, ResNet-18's 11.7 M parameters; needs flwr

Three servers average the same updates: plain FedAvg of fp32 replies; ``Decompress`` around a strategy that overrides
``aggregate_train``, which gets every reply decoded; and ``Decompress(FedAvg())``, which decodes and sums in one pass.
Rounds go through them in turn, beginning with another one each time; times are medians. Memory is what one more call
allocates at most (tracemalloc, which NumPy and bytes report to), without the replies themselves: a count, not a
measurement. "apart" is how far the mean is from that of decoded replies: the norm of the difference by that of the
mean change.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import tracemalloc
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.supercore.task_identity import TaskIdentity

from pykernels.comm import flower


class Elsewise(FedAvg):
    """Averages as FedAvg does, which `Decompress` cannot know."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, replies)


def shapes(width: int) -> list[tuple[int, ...]]:
    """Of ResNet-18's parameters, if the first stage has 64 channels."""
    found: list[tuple[int, ...]] = [(width, 3, 7, 7), (width,), (width,)]
    channels = width
    for stage in range(4):
        for _ in range(2):
            out = width << stage
            for n in (channels, out):
                found += [(out, n, 3, 3), (out,), (out,)]
            if channels != out:
                found += [(out, channels, 1, 1), (out,), (out,)]
            channels = out
    return [*found, (1000, channels), (1000,)]


def record(arrays: list[np.ndarray]) -> ArrayRecord:
    return ArrayRecord({f"{i}": Array(x) for i, x in enumerate(arrays)})


class Nodes:
    """As much of a Grid as FedAvg asks for when it makes messages."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.count + 1))


def answers(messages: list[Message], start: list[np.ndarray], codec: str | None) -> list[Message]:
    """Of clients, each of which changes everything by noise of a hundredth."""
    replies = []
    for message in messages:
        node = message.metadata.dst_node_id

        def train(message: Message, context: Context, node: int = node) -> Message:
            random = np.random.default_rng(node)
            mine = [x + np.float32(0.01) * random.standard_normal(x.shape, np.float32) for x in start]
            metrics = MetricRecord({"num-examples": 100 + 7 * node, "loss": 1.0})
            return Message(RecordDict({"arrays": record(mine), "metrics": metrics}), reply_to=message)

        context = Context(1, node, {}, RecordDict(), {})
        mod = flower.compress(codec, error_feedback=False) if codec else None
        replies.append(mod(message, context, train) if mod else train(message, context))
    return replies


def averaged(strategy: Strategy, replies: list[Message]) -> dict[str, np.ndarray]:
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays_of(arrays)


def arrays_of(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays.items()}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for name in a))


def peak(strategy: Strategy, replies: list[Message]) -> int:
    tracemalloc.start()
    strategy.aggregate_train(1, replies)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (64)")
    parser.add_argument("--codecs", default="int8,int4,bf16")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    random = np.random.default_rng(0)
    start = [random.standard_normal(shape, np.float32) for shape in shapes(given.width)]
    arrays = record(start)
    size = sum(x.size for x in start)
    print(f"{given.clients} clients, {size / 1e6:.2f} M parameters, medians of {given.rounds} rounds")
    print(f"{'replies':8}{'server':>12}{'MB a reply':>12}{'ms':>9}{'MB at most':>12}{'apart':>10}")
    for codec in given.codecs.split(","):
        entrants: dict[str, tuple[Strategy, list[Message]]] = {}
        for name, strategy in (
            ("plain", FedAvg()),
            ("decoded", flower.Decompress(Elsewise())),
            ("one pass", flower.Decompress(FedAvg())),
        ):
            messages = list(strategy.configure_train(1, arrays, ConfigRecord(), Nodes(given.clients)))
            messages.sort(key=lambda message: message.metadata.dst_node_id)
            entrants[name] = strategy, answers(messages, start, None if name == "plain" else codec)
        order, times = list(entrants), {name: list[float]() for name in entrants}
        for _ in range(given.rounds):
            order.append(order.pop(0))
            for name in order:
                begin = time.perf_counter()
                entrants[name][0].aggregate_train(1, entrants[name][1])
                times[name].append(time.perf_counter() - begin)
        means = {name: averaged(*entrant) for name, entrant in entrants.items()}
        for name, (strategy, replies) in entrants.items():
            wire = sum(len(a.data) for a in next(iter(replies[0].content.array_records.values())).values())
            apart = distance(means[name], means["decoded"]) / distance(means["decoded"], arrays_of(arrays))
            print(
                f"{'fp32' if name == 'plain' else codec:8}{name:>12}{wire / 1e6:12.2f}"
                f"{1e3 * statistics.median(times[name]):9.0f}{peak(strategy, replies) / 1e6:12.1f}"
                f"{apart:10.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
