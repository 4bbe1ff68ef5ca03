"""Messages of the Open Inference Protocol, version 2, which HTTP and gRPC share: what a request asks for, and what is
told of server and models. Field names are those of both its JSON and its protocol buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import pykernels
from pykernels.serve.batching import Counts
from pykernels.serve.errors import Forbidden, Invalid, Unsupported
from pykernels.serve.linked import Linked
from pykernels.serve.model import Model
from pykernels.serve.service import Service
from pykernels.tune.on_device import OnDevice

__all__ = [
    "EXTENSIONS",
    "Call",
    "config",
    "index",
    "load",
    "metadata",
    "refuse",
    "server",
    "statistics",
    "time_limit",
    "unload",
]

PLATFORM = "pykernels"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics", "schedule_policy"]
# Parts of the protocol that clients may ask for and do not get: by parameter.
_REFUSED = {
    "sequence_id": "networks keep nothing between requests",
    "shared_memory_region": "there is no shared memory with clients",
    "classification": "outputs are not classified",
    "priority": "all requests are equal",
}


@dataclass
class Call:
    """An inference request of either protocol.

    Attributes:
        id: which the response repeats.
        inputs: by name.
        outputs: the names wanted, and whether as bytes; all where it is empty.
        time_limit: seconds after which nobody wants the answer.
        binary: whether outputs are wanted as bytes where `outputs` does not say.
    """

    id: str
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, bool] = field(default_factory=dict)
    time_limit: float = math.inf
    binary: bool = False

    async def answer(self, service: Service, model: Model) -> dict[str, torch.Tensor]:
        """The outputs that are wanted, in the order in which they are.

        Raises:
            Refused: in one of its kinds.
        """
        known = [spec.name for spec in model.signature.outputs]
        for name in self.outputs:
            if name not in known:
                raise Invalid(f"output {name!r:.80} is unknown; the outputs are {', '.join(known)}")
        found = await service.infer(model, self.inputs, self.time_limit)
        return {name: found[name] for name in self.outputs or known}


def refuse(parameters: Mapping[str, Any]) -> None:
    """Whether parameters of a request, an input or an output ask for what there is not.

    Raises:
        Unsupported: they do.
    """
    for name, reason in _REFUSED.items():
        if parameters.get(name):
            raise Unsupported(f"parameter {name!r}: {reason} here")


def time_limit(parameters: Mapping[str, Any]) -> float:
    """Seconds after which nobody wants the answer, by the parameter ``timeout``, which is in microseconds.

    Raises:
        Invalid: it is no whole number above 0.
    """
    timeout = parameters.get("timeout")
    if timeout is None or timeout == 0:
        return math.inf
    if type(timeout) is not int or timeout < 0:
        raise Invalid(f"parameter 'timeout' must be a whole number of microseconds, not {timeout!r:.80}")
    return timeout / 1e6


def server() -> dict[str, Any]:
    """Metadata of the server."""
    return {"name": PLATFORM, "version": pykernels.__version__, "extensions": EXTENSIONS}


def metadata(service: Service, model: Model) -> dict[str, Any]:
    """Metadata of a model; sizes that are free are -1."""
    found: dict[str, Any] = {
        "name": model.name,
        "versions": [str(version) for version in service.repository.versions(model.name)],
        "platform": PLATFORM,
    }
    for kind, specs in (("inputs", model.signature.inputs), ("outputs", model.signature.outputs)):
        found[kind] = [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]
    return found


def config(service: Service, model: Model) -> dict[str, Any]:
    """A model's configuration in Triton's form, in which shapes leave out the rows that batches are made of."""
    batches, network = model.apart is None, model.network
    gpus = network.gpus if isinstance(network, Linked) else []
    if isinstance(network, OnDevice):
        gpus = [network.device.index or 0]
    where: dict[str, Any] = {"kind": "KIND_GPU", "gpus": gpus} if gpus else {"kind": "KIND_CPU"}
    found: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": model.queue.costs.most if batches else 0,
        "instance_group": [
            {"name": f"{model.name}_0", **where, "count": model.queue.runner.at_once},
        ],
        "default_model_filename": "net.pk",
    }
    if batches:
        found["dynamic_batching"] = {"preferred_batch_size": list(model.queue.costs.seconds)}
    else:
        found["parameters"] = {"apart": {"string_value": model.apart}}
    for kind, specs in (("input", model.signature.inputs), ("output", model.signature.outputs)):
        found[kind] = [
            {
                "name": s.name,
                "data_type": f"TYPE_{s.datatype}",
                "dims": list(s.shape[1:] if batches else s.shape),
            }
            for s in specs
        ]
    return found


def statistics(service: Service, name: str = "", version: str = "") -> dict[str, Any]:
    """What became of requests, of one model or of all; durations in nanoseconds.

    Raises:
        NotFound: there is no such model or version.
        Invalid: the version is no whole number.
    """
    repository = service.repository
    keys = repository.keys(name, version)
    found = [_statistics(*key, repository.counts[key]) for key in keys if key in repository.counts]
    return {"model_stats": found}


def _statistics(name: str, version: int, counts: Counts) -> dict[str, Any]:
    calls = sum(number for number, _ in counts.batches.values())
    parts = {
        what: sum(getattr(spent, part) for _, spent in counts.batches.values())
        for what, part in (("compute_input", "gather"), ("compute_infer", "compute"), ("compute_output", "scatter"))
    }
    return {
        "name": name,
        "version": str(version),
        "last_inference": int(counts.last * 1e3),
        "inference_count": counts.rows,
        "execution_count": calls,
        "inference_stats": {
            "success": _duration(counts.answered, counts.whole),
            "fail": _duration(counts.failed, counts.failed_seconds),
            "queue": _duration(counts.answered, counts.waited),
            **{what: _duration(counts.answered, seconds) for what, seconds in parts.items()},
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(number, spent.gather),
                "compute_infer": _duration(number, spent.compute),
                "compute_output": _duration(number, spent.scatter),
            }
            for rows, (number, spent) in sorted(counts.batches.items())
        ],
    }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


def index(service: Service, ready: bool) -> list[dict[str, str]]:
    """Versions of all models, only those that are ready on request."""
    return [
        {"name": s.name, "version": str(s.version), "state": s.state, "reason": s.reason}
        for s in service.repository.index()
        if s.state == "READY" or not ready
    ]


async def load(service: Service, name: str, parameters: Mapping[str, Any]) -> None:
    """Bring a model into service.

    Raises:
        Refused: clients may not, there is no such model, or it cannot be loaded.
    """
    _may_control(service)
    if parameters:  # a configuration, or files: what is served is in the folder
        raise Unsupported(f"parameter {next(iter(parameters))!r:.80}: models are loaded as they are in the folder")
    await service.repository.load(name)


def unload(service: Service, name: str) -> None:
    """Take a model out of service.

    Raises:
        Refused: clients may not, or there is no such model.
    """
    _may_control(service)
    service.repository.unload(name)


def _may_control(service: Service) -> None:
    if not service.options.control:
        raise Forbidden("models are not loaded or unloaded by clients here")
