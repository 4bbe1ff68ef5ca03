"""``/metrics`` in Prometheus's text form."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from pykernels.serve.linked import Linked
from pykernels.serve.protocols.http import Routes
from pykernels.serve.service import Service

__all__ = ["Metrics", "router"]

LABELS = ("model", "version")
OUTCOMES = ("answered", "failed", "expired", "cancelled", "refused")


class Metrics(Collector):
    """What a service counted, read when it is asked for.

    Args:
        service: whose.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "pykernels_requests", "Requests by what became of them.", labels=(*LABELS, "outcome")
        )
        rows = CounterMetricFamily("pykernels_rows", "Rows that were answered.", labels=LABELS)
        batches = CounterMetricFamily("pykernels_batches", "Calls of the network by rows.", labels=(*LABELS, "rows"))
        seconds = {
            "request": ("From the request's place in the queue to its answer.", "whole"),
            "queue": ("Waiting in the queue.", "waited"),
        }
        spent = CounterMetricFamily("pykernels_compute_seconds", "Calls of the network.", labels=LABELS)
        times = {
            name: CounterMetricFamily(f"pykernels_{name}_seconds", text, labels=LABELS)
            for name, (text, _) in seconds.items()
        }
        waiting = GaugeMetricFamily("pykernels_waiting_requests", "Requests in the queue.", labels=LABELS)
        mapped = GaugeMetricFamily(
            "pykernels_mapped_bytes", "Bytes of the mapped file, or of weights on a GPU.", labels=LABELS
        )
        restarts = CounterMetricFamily(
            "pykernels_part_restarts", "Processes of a split network's parts that were started anew.", labels=LABELS
        )
        repository = self.service.repository
        for (name, version), counts in sorted(repository.counts.items()):
            which = [name, str(version)]
            for outcome in OUTCOMES:
                requests.add_metric([*which, outcome], getattr(counts, outcome))
            rows.add_metric(which, counts.rows)
            for size, (number, _) in sorted(counts.batches.items()):
                batches.add_metric([*which, str(size)], number)
            spent.add_metric(which, sum(found.compute for _, found in counts.batches.values()))
            for key, (_, attribute) in seconds.items():
                times[key].add_metric(which, getattr(counts, attribute))
        for (name, version), model in sorted(repository.mapped.items()):
            waiting.add_metric([name, str(version)], len(model.queue.waiting))
            mapped.add_metric([name, str(version)], model.bytes)
            if isinstance(model.network, Linked):
                restarts.add_metric([name, str(version)], model.network.chain.restarts)
        budget = self.service.budget
        runners = {self.service.runner, *(model.queue.runner for model in repository.mapped.values())}
        busy = GaugeMetricFamily(
            "pykernels_busy_instances", "Calls under way.", sum(runner.at_once - runner.free for runner in runners)
        )
        instances = GaugeMetricFamily(
            "pykernels_instances", "Calls that may be under way.", sum(runner.at_once for runner in runners)
        )
        held = GaugeMetricFamily("pykernels_request_bytes", "Bytes of requests in memory.", budget.used)
        return [requests, rows, batches, spent, *times.values(), waiting, mapped, restarts, busy, instances, held]


def router(service: Callable[[], Service]) -> Routes:
    """The route.

    Args:
        service: who answers; asked at each request.
    """
    routes = Routes()

    @routes.at("GET", "/metrics")
    async def metrics(_: Request) -> Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Metrics(service()))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes
