"""Networks on a GPU, called from the host: copies there and back, on a stream of each thread; with a stand-in."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.tune.on_device import OnDevice, calls_to_warm_up, copy_on, from_host
from tests.networks import Mixed, lively
from tests.stand_in import Gpu

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def network() -> pk.Optimized:
    return pk.optimize(lively(Mixed(), 3, 16, 16), (X,))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_answers_have_arrived_when_a_call_returns(network: pk.Optimized, gpu: Gpu) -> None:
    there = from_host(copy_on(network, "cuda"))
    assert isinstance(there, OnDevice) and str(there.device) == "cuda"
    assert gpu.log == ["synchronized cuda"]  # the weights are there before a stream reads them
    for batch in (2, 1):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(there(x), network(x), rtol=1e-5, atol=1e-6)
    assert gpu.log[1:] == ["slept"] * 2
    assert gpu.captured == 2  # a graph for each size


def test_inputs_by_name_and_nested_answers_are_the_networks(gpu: Gpu) -> None:
    class Named(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            return {"sums": [a + b, a - b]}

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    network = pk.optimize(Named(), {"a": a, "b": b})
    there = from_host(copy_on(network, "cuda"))
    found = there(b=b, a=a)
    assert torch.equal(found["sums"][0], a + b) and torch.equal(found["sums"][1], a - b)
    assert (
        isinstance(there, OnDevice) and there.input_names == ["a", "b"] and there.nested([a, b])[1] == {"a": a, "b": b}
    )


def test_threads_have_streams_of_their_own(network: pk.Optimized, gpu: Gpu) -> None:
    there, together = from_host(copy_on(network, "cuda")), threading.Barrier(3)

    def call() -> None:
        together.wait(30)
        for _ in range(4):
            torch.testing.assert_close(there(X), network(X), rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(call) for _ in range(3)]:
            done.result()
    assert len({stream.thread for stream in gpu.streams}) == len(gpu.streams) == 3


def test_tensors_that_are_elsewhere_are_refused(network: pk.Optimized, gpu: Gpu) -> None:
    there = from_host(copy_on(network, "cuda"))
    with pytest.raises(ValueError, match="inputs: a tensor is on meta; calls from the host take those of its memory"):
        there(X.to("meta"))


def test_a_copy_is_made_only_where_the_network_is_not(network: pk.Optimized, gpu: Gpu) -> None:
    there = copy_on(network, "cuda")
    assert network.report().device == "cpu" and copy_on(network, "cpu") is network is from_host(network)
    assert there.report().device == "cuda" and copy_on(there, "cuda") is there
    with pytest.raises(ValueError, match="device: cuda:1 cannot be used: torch finds 1 CUDA devices here"):
        copy_on(there, "cuda:1")
    assert calls_to_warm_up(network) == 1 < calls_to_warm_up(there) == calls_to_warm_up(from_host(there))


def test_instances_run_where_their_setup_says(network: pk.Optimized, gpu: Gpu) -> None:
    with pk.Instances(network, pk.Setup(1, 1, device="cuda")) as instances:
        torch.testing.assert_close(instances(X), network(X), rtol=1e-5, atol=1e-6)
    assert gpu.captured == 1 and network.report().device == "cpu"
    with pk.Instances(copy_on(network, "cuda"), pk.Setup(1, 1)) as instances:  # where the network is
        torch.testing.assert_close(instances(X), network(X), rtol=1e-5, atol=1e-6)
    assert gpu.captured == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_and_leaves_no_thread(network: pk.Optimized) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="device: cuda cannot be used: "):
        pk.Instances(network, pk.Setup(1, 1, device="cuda"))
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="devices: cuda cannot be used: "):
        pk.tune(network, X, devices=["cpu", "cuda"])
