"""The server's side of Flower's older strategies (``flwr.server.strategy``), which go with a ``client_fn``."""

from __future__ import annotations

from typing import Any

from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg, Strategy

from pykernels.comm.flower.client import SERVER_ROUND
from pykernels.comm.flower.payload import Arrays, Update, clipping_norm, decode, mean, read
from pykernels.comm.stats import Stats

Fit = tuple[ClientProxy, FitRes]
Failure = Fit | BaseException


class DecompressFit(Strategy):
    """What ``comm.flower.Decompress`` makes of a strategy of ``flwr.server.strategy``; the same for ``fit``.

    Where `strategy` averages by FedAvg's own ``aggregate_fit``, results are decoded and summed in one pass, and the
    strategy gets them without arrays. One that is not what :func:`compress` sends becomes a failure that names the
    client. Clients are told the round (``server-round``) in their configuration.

    Args:
        strategy: any of ``flwr.server.strategy``, wrappers for differential privacy as well.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._stats = Stats()
        self._sent: dict[str, FitIns] = {}  # by client, in this round

    def stats(self) -> Stats:
        """As of :class:`Decompress`."""
        return Stats(self._stats.steps, self._stats.gradient_bytes, self._stats.wire_bytes)

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        asked = self.strategy.configure_fit(server_round, parameters, client_manager)
        told = [(client, FitIns(ins.parameters, {**ins.config, SERVER_ROUND: server_round})) for client, ins in asked]
        self._sent = {client.cid: ins for client, ins in told}
        return told

    def aggregate_fit(
        self, server_round: int, results: list[Fit], failures: list[Failure]
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        self._stats.steps += 1
        known: dict[int, Arrays] = {}
        failures, answers = list(failures), []
        for client, result in results:
            try:
                answers.append((client, result, self._read(client, result, known)))
            except ValueError as error:
                failures.append(_refused(client, error))
        if getattr(self.strategy.aggregate_fit, "__func__", None) is FedAvg.aggregate_fit:
            found = mean([update for *_, update in answers], [result.num_examples for _, result, _ in answers])
            if found is not None and all(self._norm(client) is None for client, *_ in answers):
                for *_, update in answers:
                    update.count(self._stats)
                empty = [(client, _with(result, [])) for client, result, _ in answers]
                mine, metrics = self.strategy.aggregate_fit(server_round, empty, failures)
                return None if mine is None else ndarrays_to_parameters(list(found.values())), metrics
        given: list[Fit] = []
        for client, result, update in answers:
            try:
                given.append((client, _with(result, list(decode(update, self._norm(client)).values()))))
                update.count(self._stats)
            except ValueError as error:
                failures.append(_refused(client, error))
        return self.strategy.aggregate_fit(server_round, given, failures)

    def _norm(self, client: ClientProxy) -> float | None:
        return clipping_norm(self._sent[client.cid].config)

    def _read(self, client: ClientProxy, result: FitRes, known: dict[int, Arrays]) -> Update:
        sent = self._sent.get(client.cid)
        if sent is None:
            raise ValueError("it was sent nothing in this round")
        if id(sent.parameters) not in known:
            arrays = parameters_to_ndarrays(sent.parameters)
            known[id(sent.parameters)] = {str(place): array for place, array in enumerate(arrays)}
        if len(result.parameters.tensors) != 1:
            raise ValueError(f"the reply has {len(result.parameters.tensors)} arrays, a payload is one")
        return read(result.parameters.tensors[0], result.parameters.tensor_type, known[id(sent.parameters)])

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        return self.strategy.evaluate(server_round, parameters)


def _with(result: FitRes, arrays: list[Any]) -> FitRes:
    return FitRes(result.status, ndarrays_to_parameters(arrays), result.num_examples, result.metrics)


def _refused(client: ClientProxy, error: ValueError) -> ValueError:
    return ValueError(f"pykernels: reply of client {client.cid}: {error}")
