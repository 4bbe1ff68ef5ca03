"""Federated averaging with ten simulated clients whose updates go through a codec.

    python examples/federated.py                    # needs flwr: pip install 'pykernels[federated]'
    python examples/federated.py --codec int4 --fraction 0.5 --rounds 20
    python -m benchmarks.comm.netns --world 11 --rates unshaped,10mbit -- python examples/federated.py --rounds 2 # root

Each client has a tenth of the images (Fashion-MNIST, Debian's ``dataset-fashion-mnist``, or scikit-learn's digits where
that is not installed) and trains on them for an epoch a round. The clients are ClientApps of Flower that are called one
after another in this process: a Grid of Flower's that needs no network. Under `flwr run` the same ClientApp and
strategy are those of the processes that Flower starts. "none" compresses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client, Listener
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # type: ignore[attr-defined]
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from images import Images, load, network
from torch import nn

from pykernels import comm

KEY = b"examples/federated.py"  # of one machine's ranks: a secret of its own where others could connect


class Clients(Grid):
    """A Grid that counts the bytes of the arrays that clients answer."""

    def __init__(self, clients: int) -> None:
        self.uplink, self.nodes = 0, list(range(1, clients + 1))
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0  # the server's

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def ask(self, messages: Sequence[Message]) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = list(messages)
        replies = self.ask(asked) if asked else []
        for reply in replies:
            self.uplink += sum(len(a.data) for record in reply.content.array_records.values() for a in record.values())
        return replies

    # What strategies do not ask for.
    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def new_context(node: int) -> Context:
    return Context(1, node, {"partition-id": node - 1}, RecordDict(), {})


class Here(Clients):
    """All clients in this process, each with a state of its own."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        super().__init__(clients)
        self.app, self.contexts = app, {node: new_context(node) for node in self.nodes}

    def ask(self, messages: Sequence[Message]) -> list[Message]:
        return [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]


class Away(Clients):
    """Each client is a rank; records travel over sockets in Flower's serialization.

    Attributes:
        travelled: seconds of each round that the slowest client did not spend with its app.
    """

    def __init__(self, clients: int) -> None:
        super().__init__(clients)
        self.travelled: list[float] = []
        with Listener(("", int(os.environ["MASTER_PORT"])), backlog=clients, authkey=KEY) as listener:
            found = [listener.accept() for _ in self.nodes]
        self.connections = {int.from_bytes(connection.recv_bytes(), "big"): connection for connection in found}

    def ask(self, messages: Sequence[Message]) -> list[Message]:
        def one(message: Message) -> tuple[Message, float]:
            connection = self.connections[message.metadata.dst_node_id]
            connection.send_bytes(recorddict_to_proto(message.content).SerializeToString())
            seconds = struct.unpack("d", connection.recv_bytes())[0]
            content = recorddict_from_proto(ProtoRecordDict.FromString(connection.recv_bytes()))
            return Message(content, reply_to=message), time.perf_counter() - begin - seconds

        begin = time.perf_counter()
        with ThreadPoolExecutor(len(messages)) as pool:
            answers = list(pool.map(one, messages))
        self.travelled.append(max(seconds for _, seconds in answers))
        return [reply for reply, _ in answers]

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()


def be_client(app: ClientApp, node: int) -> None:
    """Answer the server until it closes the connection."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while True:
        try:
            connection = Client(address, authkey=KEY)
            break
        except ConnectionRefusedError:  # the server is not up yet
            time.sleep(0.1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, node, node
    connection.send_bytes(node.to_bytes(4, "big"))
    context = new_context(node)
    with connection, contextlib.suppress(EOFError):
        while True:
            content = recorddict_from_proto(ProtoRecordDict.FromString(connection.recv_bytes()))
            begin = time.perf_counter()
            reply = app(Message(content, node, "train"), context)
            connection.send_bytes(struct.pack("d", time.perf_counter() - begin))
            connection.send_bytes(recorddict_to_proto(reply.content).SerializeToString())


def client_app(images: Images, options: argparse.Namespace) -> ClientApp:
    app = ClientApp(mods=[] if options.codec == "none" else [comm.flower.compress(options.codec)])
    model = network(images, options.width)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(message.content["config"]["server-round"])
        mine = slice(int(context.node_config["partition-id"]), None, options.clients)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        torch.manual_seed(1000 * number + context.node_id)
        optimizer = torch.optim.SGD(model.parameters(), options.lr, 0.9, weight_decay=5e-4)
        inputs, labels = images.train[mine], images.train_labels[mine]
        total = 0.0
        for batch in torch.randperm(len(labels)).split(options.batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images.augment(inputs[batch])), labels[batch])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        metrics = MetricRecord({"num-examples": len(labels), "loss": total / len(labels)})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="int8", help="of the clients' updates (int8), or none")
    parser.add_argument("--clients", type=int, default=10, help="how many (10); ranks less one under a launcher")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the clients that train in a round (1.0)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--data", default="auto", choices=["auto", "fashion-mnist", "digits"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=32, help="channels of the network's first stage (32)")
    parser.add_argument("--lr", type=float, default=0.05)
    options = parser.parse_args()
    images = load(options.data)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        options.clients = ranks - 1
    if rank > 0:
        be_client(client_app(images, options), rank)
        return
    torch.manual_seed(0)
    model = network(images, options.width)
    print(f"{images.name}: {len(images.train)} images over {options.clients} clients, codec {options.codec}")

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(part).argmax(1) for part in images.test.split(500)])
        accuracy = float((answers == images.test_labels).float().mean())
        print(f"round {number}: test {accuracy:.2%}", flush=True)
        return MetricRecord({"accuracy": accuracy})

    averaged = FedAvg(fraction_train=options.fraction, fraction_evaluate=0.0)
    strategy = averaged if options.codec == "none" else comm.flower.Decompress(averaged)
    grid: Clients = Here(client_app(images, options), options.clients) if ranks == 1 else Away(options.clients)
    begin = time.perf_counter()
    start = ArrayRecord(model.state_dict())
    result = strategy.start(grid, start, options.rounds, train_config=ConfigRecord(), evaluate_fn=evaluate)
    size = sum(len(array.data) for array in start.values())
    trained = options.rounds * max(2, int(options.clients * options.fraction))
    accuracy = result.evaluate_metrics_serverapp[options.rounds]["accuracy"]
    print(
        f"test accuracy {accuracy:.2%} after {options.rounds} rounds, {time.perf_counter() - begin:.0f} s; uplink "
        f"{grid.uplink / trained / 1e6:.3f} MB a client and round, {grid.uplink / trained / size:.3f} of plain arrays"
    )
    if isinstance(grid, Away):
        grid.close()
        print(f"seconds a round that messages travelled: {', '.join(f'{s:.2f}' for s in grid.travelled)}")


if __name__ == "__main__":
    main()
