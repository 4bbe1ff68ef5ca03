"""On Ray Serve: both protocols, errors in their forms, replicas on cores of their own, a replica that dies, the end."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from deployed import Deployed, deploy
from torch import nn
from tritonclient.utils import InferenceServerException

import pykernels as pk

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
pytest.importorskip("ray", reason="the extra `serve` is not installed")
REPLICAS = min(2, len(os.sched_getaffinity(0)))
PATIENCE = 400  # seconds for Ray to start on a busy machine


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "line.pk"
    pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),)).save(path)
    return path


@pytest.fixture(scope="module")
def deployed(net: Path) -> Iterator[Deployed]:
    with deploy(net, "--replicas", str(REPLICAS), "--max-batch", "4") as found:
        yield found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_have_the_bits_of_the_loaded_network(deployed: Deployed, net: Path, protocol: str) -> None:
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    x = torch.randn(2, 4)
    with module.InferenceServerClient(getattr(deployed, protocol)) as client:
        given = module.InferInput("input_1", [2, 4], "FP32")
        given.set_data_from_numpy(x.numpy())
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("line")
        found = torch.from_numpy(client.infer("line", [given]).as_numpy("output_0").copy())
        assert torch.equal(found, pk.load(net)(x))
        with pytest.raises(InferenceServerException, match="model 'nothing' is unknown") as caught:
            client.infer("nothing", [given])
        assert str(caught.value.status()) in ("404", "StatusCode.NOT_FOUND")
        with pytest.raises(InferenceServerException, match="input 'input_1' is missing"):
            client.infer("line", [])


def test_replicas_have_cores_of_their_own(deployed: Deployed) -> None:
    found = []
    for pid in deployed.replicas():
        threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
        cores = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
        assert len(cores) == 1 and all(len(own) == 1 for own in cores)
        found.append(next(iter(cores)))
    assert len(found) == REPLICAS and len(set(found)) == REPLICAS


def test_a_replica_that_is_killed_is_replaced(deployed: Deployed, net: Path) -> None:
    x = torch.randn(2, 4)
    before = deployed.replicas()
    os.kill(before[0], signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while len(now := deployed.replicas()) < REPLICAS or before[0] in now:
        assert time.monotonic() < end
        time.sleep(0.5)
    answered = 0
    while answered < 20:
        assert time.monotonic() < end
        try:
            assert torch.equal(deployed.ask(x), pk.load(net)(x))
            answered += 1
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)


def test_it_ends_within_25_seconds_and_leaves_nothing(deployed: Deployed) -> None:
    replicas = deployed.replicas()
    begin = time.monotonic()
    deployed.process.send_signal(signal.SIGTERM)
    assert deployed.process.wait(60) == 0
    assert time.monotonic() - begin < 25
    time.sleep(3)
    assert not [pid for pid in replicas if Path(f"/proc/{pid}").exists()]
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{deployed.http}/ping", timeout=5)
