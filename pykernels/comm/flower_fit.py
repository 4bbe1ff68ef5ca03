"""The strategies of Flower's older interface, ``flwr.server.strategy``, whose clients send through a codec."""

from __future__ import annotations

from dataclasses import replace
from logging import WARNING
from typing import Any

import numpy as np
from flwr.common import FitIns, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM

from pykernels.comm.flower_wire import Arrays, Update
from pykernels.comm.stats import Stats


class DecompressFit(Strategy):
    """As :class:`pykernels.comm.flower.Decompress`, for a strategy that gets ``FitRes``: every one is decoded.

    ::

        app = ClientApp(client_fn, mods=[comm.flower.compress("int8")])
        strategy = comm.flower.DecompressFit(flwr.server.strategy.FedAvg())

    What :func:`pykernels.comm.flower.compress` does not send becomes one of the strategy's `failures`, and is logged
    with the client's id.

    Args:
        strategy: any of ``flwr.server.strategy``.

    Raises:
        TypeError: `strategy` is none, or a DecompressFit.
    """

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy) or isinstance(strategy, DecompressFit):
            raise TypeError(f"pykernels: strategy must be one of flwr.server.strategy, not {type(strategy).__name__}")
        self.strategy = strategy
        self._stats = Stats()
        self._sent: dict[str, FitIns] = {}  # by client, in this round

    def stats(self) -> Stats:
        """Rounds of training (`steps`), bytes of the replies' arrays decoded (`gradient_bytes`) and as they came."""
        return Stats(self._stats.steps, self._stats.gradient_bytes, self._stats.wire_bytes)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        instructions = self.strategy.configure_fit(server_round, parameters, client_manager)
        self._sent = {client.cid: told for client, told in instructions}
        return instructions

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Any]]:
        self._stats.steps += 1
        known: dict[int, Arrays] = {}
        decoded, failures = [], list(failures)
        for client, result in results:
            try:
                decoded.append((client, self._decoded(client, result, known)))
            except ValueError as error:
                refused = ValueError(f"pykernels: reply of client {client.cid}: {error}")
                log(WARNING, "%s", refused)
                failures.append(refused)
        return self.strategy.aggregate_fit(server_round, decoded, failures)

    def _decoded(self, client: ClientProxy, result: FitRes, known: dict[int, Arrays]) -> FitRes:
        """`known`: arrays of parameters that were sent, by their id."""
        told = self._sent.get(client.cid)
        if told is None:
            raise ValueError("it was sent nothing in this round")
        if id(told.parameters) not in known:
            arrays = parameters_to_ndarrays(told.parameters)
            known[id(told.parameters)] = {str(i): np.asarray(x, order="C") for i, x in enumerate(arrays)}
        sent = result.parameters
        if len(sent.tensors) != 1:
            raise ValueError("it was not compressed by comm.flower.compress")
        update = Update.read(sent.tensor_type, sent.tensors[0], known[id(told.parameters)])
        norm = told.config.get(KEY_CLIPPING_NORM)
        found = update.arrays(norm if isinstance(norm, int | float) else None)
        update.count(self._stats)
        return replace(result, parameters=ndarrays_to_parameters(list(found.values())))

    # What no codec is in the way of.

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        return self.strategy.initialize_parameters(client_manager)

    def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: ClientManager) -> Any:
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round: int, results: Any, failures: Any) -> Any:
        return self.strategy.aggregate_evaluate(server_round, results, failures)

    def evaluate(self, server_round: int, parameters: Parameters) -> Any:
        return self.strategy.evaluate(server_round, parameters)


__all__ = ["DecompressFit"]
