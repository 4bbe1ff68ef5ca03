"""When calls become CUDA graphs, which are kept, and why not: with a stand-in for torch.cuda."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from networks import Mixed, lively
from stand_in import Network, graphs

import pykernels as pk
from pykernels.cuda.graphs import PATIENCE, WARM_UP, CudaGraphs


def test_a_graph_is_captured_once_and_replayed_on_new_inputs() -> None:
    call, network, cuda = graphs()
    answers = []
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2, 3), value)
        y, nothing = call(x)
        assert nothing is None and torch.equal(y, x * 2 + 1)
        answers.append(y)
    assert network.calls == WARM_UP + 1
    assert cuda.log.count("captured") == 1 and cuda.log.count("replay") == 3 and cuda.log.count("pool") == 1
    assert torch.equal(answers[0], torch.full((2, 3), 3.0)), "an answer must not change with the next call"


def test_calls_wait_for_the_one_before() -> None:
    call, _, cuda = graphs()
    call(torch.ones(2))
    call(torch.ones(2))
    inner = [word for word in cuda.log if word in ("current.wait_event", "replay", "event.record")]
    assert inner == ["current.wait_event", "replay", "event.record"] * 2


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(3, 4),),
        (torch.ones(2, 4).double(),),
        (torch.ones(4, 2).t(),),
        (torch.ones(2, 4), 3),
        (torch.ones(2, 4), 3.0),
        (torch.ones(2, 4), True),
    ],
    ids=["shape", "dtype", "strides", "an integer", "a number", "a truth"],
)
def test_another_kind_of_input_has_a_graph_of_its_own(other: tuple[Any, ...]) -> None:
    call, _, cuda = graphs()
    for inputs in ((torch.ones(2, 4),), other, (torch.ones(2, 4),), other):
        call(*inputs)
    assert cuda.log.count("captured") == len(call) == 2


def test_the_graphs_used_last_are_kept() -> None:
    call, _, cuda = graphs(limit=2)
    for n in (1, 2, 1, *[3] * PATIENCE, 1, 3):  # 3 drives out 2 in the end
        assert torch.equal(call(torch.ones(n))[0], torch.full((n,), 3.0))
    assert cuda.log.count("captured") == 3 and cuda.log.count("replay") == 3 + 1 + 2
    call(torch.ones(2))
    assert cuda.log.count("captured") == 3 and len(call) == 2


def test_many_kinds_in_turn_do_not_drive_each_other_out() -> None:
    call, _, cuda = graphs(limit=2)
    for _ in range(PATIENCE - 1):
        for n in range(1, 6):
            call(torch.ones(n))
    assert cuda.log.count("captured") == 2


def test_inputs_that_overlap_are_captured_as_what_they_say() -> None:
    call, _, _ = graphs()
    for start in (0.0, 5.0):
        x = (torch.arange(3.0) + start).expand(4, 3)
        assert torch.equal(call(x)[0], x * 2 + 1)


def test_inference_mode_leaves_no_trace_in_the_graph() -> None:
    call, _, _ = graphs()
    with torch.inference_mode():
        call(torch.ones(2))
    assert torch.equal(call(torch.zeros(2))[0], torch.ones(2))


def test_why_not() -> None:
    call, network, cuda = graphs()
    x = torch.ones(2)
    assert call.why_not((x,)) is None
    assert call.why_not((x.to("meta"),)) == "inputs are not on a cpu device"
    assert call.why_not((1,)) == "inputs are not on a cpu device"
    assert call.why_not((x, object())) == "an input is neither a tensor nor a number"
    assert call.why_not((x.clone().requires_grad_(),)) == "gradients are recorded"
    with torch.no_grad():
        assert call.why_not((x.clone().requires_grad_(),)) is None
    with torch._subclasses.FakeTensorMode():
        assert call.why_not((x,)) == "the call is traced"
    torch.func.vmap(lambda y: [call.why_not((y,)), y][1])(x)
    cuda.capturing = True
    assert call.why_not((x,)) == "a capture is under way: the network becomes part of it"
    call(x)
    assert network.calls == 1 and "captured" not in cuda.log


def test_a_transformed_call_is_not_captured() -> None:
    call, _, cuda = graphs()
    assert torch.equal(torch.func.vmap(lambda y: call(y)[0])(torch.ones(3, 2)), torch.full((3, 2), 3.0))
    assert "captured" not in cuda.log


def test_what_cannot_be_captured_runs_call_by_call_and_says_so() -> None:
    call, network, cuda = graphs()
    cuda.fails = True
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph .*operation not permitted"):
        assert torch.equal(call(torch.ones(2))[0], torch.full((2,), 3.0))
    before = network.calls
    call(torch.ones(2))
    assert network.calls == before + 1 and call.refused is not None


def test_errors_of_the_network_itself_are_its_own() -> None:
    call, _, _ = graphs(network=Network(lambda x: (x @ torch.ones(7, 7),)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call(torch.ones(2, 3))
    assert call.refused is None


def test_copies_capture_graphs_of_their_own() -> None:
    fast = pk.optimize(lively(Mixed(), 3, 12, 12), torch.randn(2, 3, 12, 12))
    fast._graphs, _, _ = graphs()
    assert copy.deepcopy(fast)._graphs is None
    assert pickle.loads(pickle.dumps(CudaGraphs(print))) is None


def test_a_network_on_the_cpu_has_none() -> None:
    fast = pk.optimize(lively(Mixed(), 3, 12, 12), torch.randn(2, 3, 12, 12), cuda_graph=False)
    assert not fast.cuda_graph
    fast.cuda_graph = True
    fast(torch.randn(2, 3, 12, 12))
    assert fast._graphs is None
