"""Flower's clients and strategies with a codec between them; without network: messages are passed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr (extra federated) is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg as FitFedAvg
from flwr.server.strategy import FedMedian as FitMedian
from flwr.server.strategy import Strategy as FitStrategy
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedProx,
    QFedAvg,
)
from flwr.supercore.task_identity import TaskIdentity

from pykernels.comm import flower
from pykernels.comm.flower import payload, server

SHAPES = {"weight": (256, 500), "bias": (96,), "half": (4, 256)}
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0


def model() -> dict[str, np.ndarray]:
    found = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**found, "half": found["half"].astype(np.float16), "steps": np.array(7), "double": np.array([0.5, 1 / 3])}


class OneProcess:
    """As much of a Grid as strategies ask for."""

    def __init__(self, nodes: int) -> None:
        self.nodes = list(range(1, nodes + 1))

    def get_node_ids(self) -> list[int]:
        return self.nodes


class Clients:
    """Each adds noise of its own, of a hundredth, to what it is sent; what the app answered is kept."""

    def __init__(self, count: int, *mods: Any) -> None:
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, count + 1)}
        self.answers: dict[int, dict[str, np.ndarray]] = {}
        self.app = ClientApp(mods=list(mods))
        self.app.train()(self.train)

    def train(self, message: Message, context: Context) -> Message:
        came = {name: array.numpy() for name, array in message.content["arrays"].items()}
        mine = {
            name: (x + 0.01 * RNG.standard_normal(x.shape)).astype(x.dtype)
            if x.dtype.kind == "f"
            else x + context.node_id
            for name, x in came.items()
        }
        self.answers[context.node_id] = mine
        arrays = ArrayRecord({name: Array(np.asarray(x)) for name, x in mine.items()})
        metrics = MetricRecord({"num-examples": 10 * context.node_id, "loss": 1.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        return self.app(message, self.contexts[node])


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(x)) for name, x in arrays.items()})


def asked(strategy: Any, arrays: dict[str, np.ndarray], clients: int, number: int = 1) -> list[Message]:
    """The messages of a round, by node: strategies draw nodes in any order."""
    messages = strategy.configure_train(number, record(arrays), ConfigRecord(), OneProcess(clients))
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def numpy(arrays: ArrayRecord | None) -> dict[str, np.ndarray]:
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def decoded(content: RecordDict, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a reply's arrays would be without the mod."""
    return numpy(server._decoded(server._reply(content, start))["arrays"])


def strategys(strategy: flower.Decompress, replies: list[Message]) -> list[Message]:
    """The replies as the strategy gets them decoded."""
    known: dict[int, dict[str, np.ndarray]] = {}
    return [strategy._decode(*strategy._read(reply, known)) for reply in replies]


class Sees(FedAvg):
    """Keeps what it was given."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.given = list(replies)
        return super().aggregate_train(server_round, self.given)


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.26), ("int4", 0.14)])
def test_the_mean_is_that_of_what_was_decoded_and_few_bytes_travel(codec: str, share: float) -> None:
    start, clients = model(), Clients(3, flower.compress(codec))
    strategy = flower.Decompress(FedAvg())
    replies = [clients.reply(message) for message in asked(strategy, start, 3)]
    given = strategys(strategy, replies)
    expected, expected_metrics = FedAvg().aggregate_train(1, given)
    strategy._stats.gradient_bytes = strategy._stats.wire_bytes = 0
    found, metrics = strategy.aggregate_train(1, replies)
    arrays, means = numpy(found), numpy(expected)
    assert list(arrays) == list(means) and metrics == expected_metrics
    weights = [10 / 60, 20 / 60, 30 / 60]
    for name, mean in means.items():
        assert arrays[name].dtype == mean.dtype and arrays[name].shape == mean.shape, name
        if name in ("steps", "double"):
            assert np.array_equal(arrays[name], mean), name
        greatest = np.max([np.abs(reply.content["arrays"][name].numpy()) for reply in given], 0).astype(mean.dtype)
        ulps = np.abs(arrays[name] - mean) / np.spacing(greatest)  # units in the last place of the greatest reply
        assert ulps.max() <= 3, (name, ulps.max())
    for name in SHAPES:
        true = sum(
            w * clients.answers[node][name].astype(np.float32) for w, node in zip(weights, (1, 2, 3), strict=True)
        )
        error = np.linalg.norm(arrays[name] - true) / np.linalg.norm(true - start[name].astype(np.float32))
        bound = {"int8": 0.02, "int4": 0.25}[codec]  # float16 has no more digits for what differs by a hundredth
        assert error < bound + 0.1 * (name == "half"), (name, error)
    # FedAvg makes float64 of integers, and clients answer with integers again
    assert arrays["steps"] == pytest.approx(7 + np.dot(weights, [1, 2, 3])) and arrays["steps"].dtype == np.float64
    for message in asked(strategy, {**arrays, "steps": np.array(7.0)}, 3, 2):
        assert not strategys(strategy, [clients.reply(message)])[0].has_error()
    assert metrics is not None and metrics["loss"] == pytest.approx(1.0)
    stats = strategy.stats()
    assert stats.steps == 1 and stats.wire_bytes <= share * stats.gradient_bytes


def test_a_strategy_that_averages_as_fedavg_does_never_has_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies come with their metrics and without arrays, nothing is decoded but the sum."""
    start, clients, seen = model(), Clients(3, flower.compress()), []

    def metrics(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.extend(contents)
        return MetricRecord({"clients": len(contents), "key": int(key == "loss")})

    strategy = flower.Decompress(FedProx(weighted_by_key="loss", train_metrics_aggr_fn=metrics))
    replies = [clients.reply(message) for message in asked(strategy, start, 3)]
    means = [decoded(reply.content, start)["weight"] for reply in replies]
    monkeypatch.setattr(server, "decode", None)
    found, told = strategy.aggregate_train(1, replies)
    assert told == {"clients": 3, "key": 1} and [len(content["arrays"]) for content in seen] == [0, 0, 0]
    assert np.allclose(numpy(found)["weight"], np.mean(means, 0), rtol=0, atol=1e-6)  # every loss is 1


def test_what_averages_otherwise_gets_the_arrays() -> None:
    start, clients, seen = model(), Clients(3, flower.compress()), Sees()
    strategy = flower.Decompress(seen)
    replies = [clients.reply(message) for message in asked(strategy, start, 3)]
    strategy.aggregate_train(1, replies)
    for reply, given in zip(replies, seen.given, strict=True):
        arrays, expected = numpy(given.content["arrays"]), decoded(reply.content, start)
        assert list(arrays) == list(start) and all(np.array_equal(x, expected[name]) for name, x in arrays.items())


@pytest.mark.parametrize("make", [FedAdam, lambda: QFedAvg(1.0, train_loss_key="loss")], ids=["FedAdam", "QFedAvg"])
def test_arrays_that_a_strategy_made_float64_are_compressed_as_well(make: Any) -> None:
    """Its scalars are float64, so after the first round the clients are sent float64, and answer that or float32."""
    arrays, clients, strategy = {"weight": model()["weight"]}, Clients(3, flower.compress()), flower.Decompress(make())
    for number in (1, 2, 3):
        messages = asked(strategy, arrays, 3, number)
        replies = [clients.reply(message) for message in messages]
        assert [len(reply.content["arrays"]["payload"].data) <= 0.26 * 4 * 256 * 500 for reply in replies] == [True] * 3
        found, _ = strategy.aggregate_train(number, replies)
        sent, arrays = arrays, numpy(found)
    assert sent["weight"].dtype == np.float64
    for given, reply in zip(strategys(strategy, replies), replies, strict=True):
        true = clients.answers[reply.metadata.src_node_id]["weight"]
        assert np.linalg.norm(given.content["arrays"]["weight"].numpy() - true) < 0.02 * np.linalg.norm(
            true - sent["weight"]
        )


def test_odd_arrays_come_through() -> None:
    """Scalars, empty ones, other orders of elements and of bytes; counters that became float64 to the bit."""
    start = {
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 5), np.float32),
        "columns": np.asfortranarray(RNG.standard_normal((7, 300)), np.float32),
        "other end": RNG.standard_normal((3, 300)).astype(">f4"),
        "counter": np.array(7 + 1 / 3),
    }
    for several in (start, {"scalar": start["scalar"]}, {"empty": start["empty"]}, {}):
        clients, strategy = Clients(2, flower.compress()), flower.Decompress(FedAvg())
        found, _ = strategy.aggregate_train(1, [clients.reply(message) for message in asked(strategy, several, 2)])
        for name, x in numpy(found).items():
            mean = clients.answers[1][name] / 3 + clients.answers[2][name] * 2 / 3
            assert x.shape == mean.shape and x.dtype == several[name].dtype
            assert np.allclose(x, mean, rtol=0, atol=1e-15 if name == "counter" else 3e-4), name


def test_clients_of_two_codecs_are_averaged_as_well() -> None:
    start, strategy = model(), flower.Decompress(FedAvg())
    several = [Clients(2, flower.compress(codec)) for codec in ("int8", "int4")]
    replies = [c.reply(m) for c, m in zip(several, asked(strategy, start, 2), strict=True)]
    found, _ = strategy.aggregate_train(1, replies)
    first, second = (decoded(reply.content, start)["weight"] for reply in replies)
    assert np.allclose(numpy(found)["weight"], first / 3 + second * 2 / 3, rtol=0, atol=1e-6)


def test_metrics_that_no_mean_can_be_weighed_by_are_the_strategys_to_refuse() -> None:
    start, clients = model(), Clients(2, flower.compress())
    strategy = flower.Decompress(FedAvg(weighted_by_key="accuracy"))
    replies = [clients.reply(message) for message in asked(strategy, start, 2)]
    with pytest.raises(InconsistentMessageReplies, match="accuracy"):
        strategy.aggregate_train(1, replies)


def test_what_one_round_lost_is_sent_in_the_next() -> None:
    """The same change again and again: in sum what arrives differs by no more than one round's loss."""
    start = {"weight": np.zeros((64, 256), np.float32)}
    change = RNG.standard_normal((64, 256)).astype(np.float32)

    def arrived(mod: Any, numbers: list[int]) -> np.ndarray:
        app = ClientApp(mods=[mod])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            content = RecordDict({"arrays": record({"weight": change}), "m": MetricRecord({"num-examples": 1})})
            return Message(content, reply_to=message)

        context, total = Context(1, 1, {}, RecordDict(), {}), np.zeros_like(change)
        for number in numbers:
            content = RecordDict({"arrays": record(start), "config": ConfigRecord({"server-round": number})})
            reply = app(Message(content, 1, "train"), context)
            total += decoded(reply.content, start)["weight"]
        return total

    def error(mod: Any, numbers: list[int]) -> float:
        return float(np.linalg.norm(arrived(mod, numbers) - len(numbers) * change) / np.linalg.norm(change))

    rounds = list(range(1, 9))
    without = error(flower.compress("int2", error_feedback=False), rounds)
    assert error(flower.compress("int2"), rounds) < 0.5 * without
    # what is older than it may be is forgotten: sampled every tenth round only
    late = [1 + 10 * n for n in range(8)]
    assert error(flower.compress("int2", forget_after=5), late) == pytest.approx(without, rel=1e-5)
    assert error(flower.compress("int2", forget_after=10), late) < 0.5 * without


def test_it_encodes_what_differential_privacy_left_and_any_strategy_gets_replies() -> None:
    start = {"weight": RNG.standard_normal((32, 256)).astype(np.float32)}
    private = LocalDpMod(clipping_norm=1e-3, sensitivity=1e-9, epsilon=1.0, delta=0.5)
    clients, strategy = Clients(3, flower.compress(), private), flower.Decompress(FedMedian())
    arrays, _ = strategy.aggregate_train(1, [clients.reply(message) for message in asked(strategy, start, 3)])
    moved = np.linalg.norm(numpy(arrays)["weight"] - start["weight"])
    assert 0 < moved < 1.2e-3  # it was clipped before
    # the other way round the mod of differential privacy answers with an error
    wrong = Clients(2, private, flower.compress())
    assert wrong.reply(asked(FedAvg(), start, 2)[0]).has_error()


@pytest.mark.parametrize("order", ["decompress around privacy", "privacy around decompress"])
def test_no_client_moves_the_model_by_more_than_it_was_told_to_clip_to(order: str) -> None:
    """A residual adds to what was clipped, while noise is made for the norm of one client."""
    start = {"weight": RNG.standard_normal((64, 256)).astype(np.float32)}
    change = RNG.standard_normal((64, 256)).astype(np.float32) ** 3
    seen, norm = Sees(), 0.5

    def always(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        reply.content["arrays"] = record({"weight": start["weight"] + change})
        return reply

    clients = Clients(2, flower.compress("onebit"), fixedclipping_mod, always)
    if order == "decompress around privacy":
        strategy: Any = flower.Decompress(DifferentialPrivacyClientSideFixedClipping(seen, 1e-9, norm, 2))
    else:
        strategy = DifferentialPrivacyClientSideFixedClipping(flower.Decompress(seen), 1e-9, norm, 2)
    for number in range(1, 7):
        replies = [clients.reply(message) for message in asked(strategy, start, 2, number)]
        sent = [np.linalg.norm(decoded(reply.content, start)["weight"] - start["weight"]) for reply in replies]
        strategy.aggregate_train(number, replies)
        moved = [np.linalg.norm(one.content["arrays"]["weight"].numpy() - start["weight"]) for one in seen.given]
        assert [x == pytest.approx(min(y, norm), rel=1e-4) for x, y in zip(moved, sent, strict=True)] == [True] * 2
    assert min(sent) > 1.05 * norm  # with what earlier rounds had left


def test_secure_aggregation_is_refused_by_name() -> None:
    start, clients = model(), Clients(2, flower.compress())
    message = asked(FedAvg(), start, 2)[0]
    message.content["secaggplus_configs"] = ConfigRecord({"stage": "setup"})
    with pytest.raises(ValueError, match="secure aggregation"):
        clients.reply(message)


def damaged(content: RecordDict, how: str) -> None:
    arrays, data = content["arrays"], content["arrays"]["payload"].data
    fields = {"dtype": "uint8", "shape": (len(data),), "stype": f"{payload.FORMAT}.int8", "data": data}
    if how == "short":
        fields.update(data=data[:-4], shape=(len(data) - 4,))
    elif how == "pickle":
        fields["stype"] = "numpy.ndarray"
    elif how == "scale":
        fields["data"] = np.float32("inf").tobytes() + data[4:]
    elif how == "codec":
        fields["stype"] = f"{payload.FORMAT}.zip"
    elif how == "other codec":
        fields["stype"] = f"{payload.FORMAT}.int4"
    elif how == "other format":
        fields["stype"] = "pykernels.0.int8"
    elif how == "two payloads":
        arrays["more"] = arrays["payload"]
    elif how == "none":
        del arrays["payload"]
    elif how == "two records":
        content["more"] = ArrayRecord()
    if how not in ("two payloads", "none", "two records"):
        arrays["payload"] = Array(**fields)


HOW = ["short", "pickle", "scale", "codec", "other codec", "other format", "two payloads", "none", "two records"]


@pytest.mark.parametrize("how", HOW)
def test_a_reply_that_is_not_what_it_should_be_is_passed_over(how: str) -> None:
    start, clients, strategy = model(), Clients(3, flower.compress()), flower.Decompress(FedAvg())
    replies = [clients.reply(message) for message in asked(strategy, start, 3)]
    good = [decoded(reply.content, start)["weight"] for reply in replies]
    damaged(replies[1].content, how)
    errors = [reply.error.reason if reply.has_error() else "" for reply in strategys(strategy, replies)]
    assert f"reply of node {replies[1].metadata.src_node_id}" in errors[1] and not errors[0] and not errors[2]
    weights = [10.0 * reply.metadata.src_node_id for reply in (replies[0], replies[2])]
    arrays, _ = strategy.aggregate_train(1, replies)
    expected = (weights[0] * good[0] + weights[1] * good[2]) / sum(weights)
    assert np.allclose(numpy(arrays)["weight"], expected, atol=1e-6)


def test_random_bytes_of_the_right_size_never_do_more_than_decode() -> None:
    start = model()
    clients, strategy = Clients(2, flower.compress()), flower.Decompress(FedAvg())
    reply = clients.reply(asked(strategy, start, 2)[0])
    size = len(reply.content["arrays"]["payload"].data)
    for _ in range(50):
        array = Array(dtype="uint8", shape=(size,), stype=f"{payload.FORMAT}.int8", data=RNG.bytes(size))
        reply.content["arrays"] = ArrayRecord({"payload": array})
        (found,) = strategys(strategy, [reply])
        assert found.has_error() or all(np.isfinite(x).all() for x in numpy(found.content["arrays"]).values())


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="codec must be one of"):
        flower.compress("zip")
    for never in (0, 1.5, "3"):
        with pytest.raises(ValueError, match="forget_after must be an integer of at least 1"):
            flower.compress(forget_after=never)  # type: ignore[arg-type]
    for wrong in (object(), flower.Decompress(FedAvg())):
        with pytest.raises(TypeError, match="strategy must be"):
            flower.Decompress(wrong)
    with pytest.raises(ValueError, match="compressed already"):
        Clients(2, flower.compress(), flower.compress()).reply(asked(FedAvg(), model(), 2)[0])
    start = model()

    def other(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        reply.content["arrays"] = record({**start, "weight": start["weight"][:5]})
        return reply

    with pytest.raises(ValueError, match=r"weight: the reply has float32 \[5, 500\], float32 \[256, 500\] was sent"):
        Clients(2, flower.compress(), other).reply(asked(FedAvg(), start, 2)[0])
    without = Message(RecordDict({"arrays": record(start)}), 1, "train")
    with pytest.raises(ValueError, match="server-round"):
        Clients(2, flower.compress(forget_after=3)).reply(without)


# ---- Flower's older form: a client_fn, and strategies of flwr.server ----


class Trainee(NumPyClient):
    """Adds noise of a hundredth to what it is sent, of its own and the same in each round."""

    def __init__(self, node: int) -> None:
        self.node = node

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
        return list(model().values())

    def fit(self, arrays: list[np.ndarray], config: dict[str, Any]) -> Any:
        rng = np.random.default_rng(self.node)
        mine = [(x + 0.01 * rng.standard_normal(x.shape)).astype(x.dtype) for x in arrays]
        return mine, 10 * self.node, {"round": config["server-round"]}


class Fits(OneProcess):
    """A Grid for the older server: hands messages to a client app, and may damage what it answers."""

    def __init__(self, nodes: int, app: ClientApp, bad: int = 0) -> None:
        super().__init__(nodes)
        self.app, self.bad, self.uplink = app, bad, 0
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in self.nodes}

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        (message,) = messages
        node = message.metadata.dst_node_id
        reply = self.app(message, self.contexts[node])
        record = reply.content.array_records["fitres.parameters"]
        if node == self.bad:
            record["payload"] = Array("uint8", (4,), f"{payload.FORMAT}.int8", b"1234")
        self.uplink += sum(len(array.data) for array in record.values())
        return [reply]


def fitted(strategy: FitStrategy, grid: Fits, start: dict[str, np.ndarray], rounds: int = 1) -> list[np.ndarray]:
    """The arrays after `rounds`, as Flower's server makes them."""
    clients = SimpleClientManager()
    for node in grid.nodes:
        clients.register(GridClientProxy(node, grid, 1))  # type: ignore[arg-type]
    served = Server(client_manager=clients, strategy=strategy)
    served.parameters = ndarrays_to_parameters(list(start.values()))
    for number in range(1, rounds + 1):
        after = served.fit_round(number, timeout=None)
        assert after is not None and after[0] is not None
        served.parameters = after[0]
    return parameters_to_ndarrays(served.parameters)


def fit_strategy(kind: type[FitFedAvg] = FitFedAvg, **options: Any) -> FitStrategy:
    return kind(min_fit_clients=3, min_available_clients=3, **options)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_client_fn_and_the_older_strategies_work_alike(inplace: bool) -> None:
    start = {name: x for name, x in model().items() if name != "steps"}
    told: list[Any] = []

    def metrics(found: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        told.extend(found)
        return {}

    results = []
    for mods, wrap in (([], lambda s: s), ([flower.compress("int8")], flower.Decompress)):
        app = ClientApp(lambda context: Trainee(context.node_id).to_client(), mods=mods)
        grid = Fits(3, app)
        strategy = wrap(
            fit_strategy(
                inplace=inplace, fit_metrics_aggregation_fn=metrics, on_fit_config_fn=lambda n: {"server-round": n}
            )
        )
        results.append((fitted(strategy, grid, start), grid.uplink, strategy))
    (plain, all_bytes, _), (found, few, strategy) = results
    assert isinstance(strategy, flower.DecompressFit) and isinstance(strategy, FitStrategy)
    assert few <= 0.26 * all_bytes and strategy.stats().wire_bytes == few
    assert sorted(told) == sorted(2 * [(10 * n, {"round": 1}) for n in (1, 2, 3)])
    for name, mean, true in zip(start, found, plain, strict=True):
        assert mean.shape == true.shape and mean.dtype == start[name].dtype, name
        moved = np.linalg.norm(true.astype(np.float64) - start[name])
        assert np.linalg.norm(mean.astype(np.float64) - true) <= 0.15 * moved, name


def test_the_older_strategies_get_decoded_results_where_they_average_otherwise() -> None:
    start = {"weight": RNG.standard_normal((64, 256)).astype(np.float32)}
    strategy = flower.Decompress(fit_strategy(FitMedian))
    app = ClientApp(lambda context: Trainee(context.node_id).to_client(), mods=[flower.compress(forget_after=1)])
    (weight,) = fitted(strategy, Fits(3, app), start, rounds=2)
    assert 0 < np.linalg.norm(weight - start["weight"]) < 0.02 * 16 * 8 * 2
    assert strategy.stats().steps == 2


@pytest.mark.parametrize("average", [FitFedAvg, FitMedian])
def test_a_result_that_is_not_what_it_should_be_is_a_failure_of_that_client(
    average: type[FitFedAvg], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failed, aggregate = {"weight": np.zeros((64, 256), np.float32)}, [], average.aggregate_fit

    def seen(self: Any, number: int, results: Any, failures: list[Any]) -> Any:
        failed.extend(failures)
        return aggregate(self, number, results, failures)

    monkeypatch.setattr(average, "aggregate_fit", seen)
    app = ClientApp(lambda context: Trainee(context.node_id).to_client(), mods=[flower.compress()])
    (weight,) = fitted(flower.Decompress(fit_strategy(average)), Fits(3, app, bad=2), start)
    assert len(failed) == 1 and "reply of client 2: the payload has 4 bytes" in str(failed[0])
    assert 0.004 < weight.std() < 0.01  # of two means of noise of a hundredth
