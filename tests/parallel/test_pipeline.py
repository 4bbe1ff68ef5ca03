"""Codecs on the wires of torch's pipelines: each test is one group of ranks."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import error, run_ranks
from torch import nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import schedules
from torch.nn.parallel import DistributedDataParallel as DDP

from pykernels import comm

pytestmark = pytest.mark.xdist_group("two ranks of tests/parallel")
SINGLE = {"GPipe": schedules.ScheduleGPipe, "1F1B": schedules.Schedule1F1B}


def from_table(stages: Any, chunks: int, **options: Any) -> Any:
    """A schedule that was written down before: what its user has in a file."""
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/table.csv"
        schedules.ScheduleInterleaved1F1B(stages, chunks, **options)._dump_csv(table)
        schedule = schedules._PipelineScheduleRuntime(stages, chunks, **options)
        schedule._load_csv(table, format="compute_comms")
    return schedule


LOOPED = {
    "Interleaved1F1B": schedules.ScheduleInterleaved1F1B,
    "LoopedBFS": schedules.ScheduleLoopedBFS,
    "InterleavedZeroBubble": schedules.ScheduleInterleavedZeroBubble,
    "table": from_table,
}
FOLDED = {"ZBV": schedules.ScheduleZBVZeroBubble, "DualPipeV": schedules.ScheduleDualPipeV}
SCHEDULES: dict[str, Callable[..., Any]] = {**SINGLE, **LOOPED, **FOLDED}
# Relative error of the gradients of all parameters together, and the share of fp32's bytes that travel at most.
BOUNDS = {"bf16": (0.02, 0.5), "int8": (0.05, 0.26), "int4": (0.7, 0.135)}
WIDTH, TOKENS = 256, 3
AT_ONCE = 20.0  # seconds: far less than the collectives' timeout, enough for a busy machine


def part(index: int) -> nn.Module:
    torch.manual_seed(index)
    # a norm at the end: torch's zero-bubble schedules refuse outputs that are views, as a linear of 3-D inputs makes
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))


def batch(step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(size, TOKENS, WIDTH, generator=generator) for _ in range(2))
    return x, y


class Pipeline:
    """A network of equal parts over all ranks, under a schedule, with `codecs` where given."""

    def __init__(
        self, name: str, codecs: dict[str, Any] | None, make: Callable[[int], nn.Module] = part, **options: Any
    ) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        count = world if name in SINGLE else 2 * world
        mine = {rank, (count - 1 - rank if name in FOLDED else rank + world)} & set(range(count))
        self.chunks = 2 * world
        self.stages = [
            pipelining.PipelineStage(make(index), index, count, torch.device("cpu")) for index in sorted(mine)
        ]
        self.handles = [comm.register(stage, **codecs) for stage in self.stages] if codecs is not None else []
        stages: Any = self.stages[0] if name in SINGLE else self.stages
        self.schedule = SCHEDULES[name](stages, self.chunks, loss_fn=nn.functional.mse_loss, **options)

    def step(self, number: int, how: str = "step") -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The output, where the last stage is, and the losses there."""
        x, y = batch(number, 2 * self.chunks)
        losses: list[torch.Tensor] = []
        last = any(stage.is_last for stage in self.stages)
        inputs = (x,) if any(stage.is_first for stage in self.stages) else ()
        for stage in self.stages:
            stage.submod.zero_grad()
        wanted = {"target": y, "losses": losses} if last else {}
        return getattr(self.schedule, how)(*inputs, **wanted), [loss.detach() for loss in losses]

    def gradients(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for stage in self.stages for p in stage.submod.parameters()])

    def share(self) -> float:
        """Bytes that were sent, of what all would have been."""
        found = [handle.stats() for handle in self.handles]
        return sum(stats.wire_bytes for stats in found) / sum(stats.gradient_bytes for stats in found)


def both(codec: str) -> dict[str, Any]:
    return {"forward": codec, "backward": codec}


def matrix(rank: int, codecs: list[str]) -> dict[tuple[str, str], tuple[bool, float, float, bool]]:
    """By schedule and codec: the same bits as plain torch; the gradients' error; the share of bytes; the same loss,
    nearly. Two steps each."""
    answers = {}
    for name in SCHEDULES:
        plain = Pipeline(name, None)
        expected = [(plain.step(n), plain.gradients())[::-1] for n in range(2)]
        for codec in codecs:
            coded = Pipeline(name, both(codec))
            found = [(coded.step(n), coded.gradients())[::-1] for n in range(2)]
            same, worst, near = True, 0.0, True
            for (g, (_, losses)), (true, (_, wanted)) in zip(found, expected, strict=True):
                same &= torch.equal(g, true) and all(torch.equal(a, b) for a, b in zip(losses, wanted, strict=True))
                worst = max(worst, error(g, true))
                near &= all(abs(float(a - b)) < 0.05 * float(b) for a, b in zip(losses, wanted, strict=True))
            answers[name, codec] = same, worst, coded.share(), near
    return answers


def check(answers: dict[tuple[str, str], tuple[bool, float, float, bool]]) -> None:
    for (name, codec), (same, worst, share, near) in answers.items():
        if codec == "fp32":
            assert same and share == 1, name
        else:
            assert not same and worst < BOUNDS[codec][0], (name, codec, worst)
            assert share <= BOUNDS[codec][1], (name, codec, share)
            assert near, (name, codec)


def few(rank: int) -> dict[tuple[str, str], tuple[bool, float, float, bool]]:
    return matrix(rank, ["fp32", "int8"])


def test_every_schedule_with_fp32_is_plain_torch_and_with_int8_near_it(found: list[dict[str, Any]]) -> None:
    for answers in (answers["few"] for answers in found):
        assert len(answers) == 2 * len(SCHEDULES)
        check(answers)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_schedule_with_every_codec(world: int) -> None:
    for answers in run_ranks(world, matrix, ["fp32", *BOUNDS]):
        assert len(answers) == (1 + len(BOUNDS)) * len(SCHEDULES)
        check(answers)


class WithPositions(nn.Module):
    """Hands on, beside activations, integer positions and a tensor that the next stage does not use."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.inner = index, part(index)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None, spare: Any = None) -> Any:
        if positions is None:
            positions = torch.arange(TOKENS).expand(len(x), TOKENS).contiguous() * 1_000_003
        y = self.inner(x + 1e-6 * positions[..., None])
        return y if self.index == 1 else (y, positions, y.sin())


class Images(nn.Module):
    """Activations that lie channels_last in memory, and are short in the last dimension."""

    def __init__(self, index: int) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.index, self.inner = index, nn.Conv2d(4 if index else 3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.index:
            return self.inner(x.contiguous()).flatten(1)[:, : TOKENS * WIDTH].unflatten(1, (TOKENS, WIDTH))
        images = x.flatten(1).unflatten(1, (3, 16, 16))
        return self.inner(images).contiguous(memory_format=torch.channels_last)


def traced(codecs: dict[str, Any] | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A network that torch has cut itself; losses and gradients of this rank's part."""
    network = nn.Sequential(part(0), part(1))
    x, y = batch(0, 8)
    pipe = pipelining.pipeline(network, (x[:2],), split_spec={"1": pipelining.SplitPoint.BEGINNING})
    stage = pipe.build_stage(dist.get_rank(), torch.device("cpu"))
    if codecs is not None:
        comm.register(stage, **codecs)
    schedule = schedules.Schedule1F1B(stage, 4, loss_fn=nn.functional.mse_loss)
    losses: list[torch.Tensor] = []
    if dist.get_rank() == 0:
        schedule.step(x)
    else:
        schedule.step(target=y, losses=losses)
    gradients = torch.cat([p.grad.flatten() for p in stage.submod.parameters()])
    return [loss.detach() for loss in losses], gradients


def ways(rank: int) -> dict[str, Any]:
    """What else a pipeline does, on two ranks."""
    answers: dict[str, Any] = {}
    plain, coded = Pipeline("1F1B", None, WithPositions), Pipeline("1F1B", both("int8"), WithPositions)
    for pipeline in (plain, coded):
        pipeline.step(0)
    answers["side outputs"] = error(coded.gradients(), plain.gradients()), 0.05
    answers["side outputs: share"] = coded.share(), 0.3

    channels_last = Pipeline("GPipe", both("int8"), Images)
    channels_last.step(0)
    answers["channels_last"] = bool(channels_last.gradients().isfinite().all())

    (_, true), (_, near), (losses, exact) = traced(None), traced(both("int8")), traced(both("fp32"))
    answers["traced"] = error(near, true), 0.05
    answers["traced, fp32"] = torch.equal(exact, true) and len(losses) == 4 * rank

    # training, evaluation, training; then without codecs
    plain, coded = Pipeline("1F1B", None), Pipeline("1F1B", both("int8"))
    for how in ("step", "eval", "step"):
        expected, found = plain.step(1, how)[0], coded.step(1, how)[0]
        if rank == 1:
            answers[f"{how} after {len(answers)}"] = error(found, expected), 0.05
    answers["steps"] = coded.handles[0].stats().steps == 3
    for handle in coded.handles:
        handle.remove()
    for stage, handle in zip(coded.stages, coded.handles, strict=True):
        second = comm.register(stage)
        handle.remove()  # once more: nothing of its own is left
        answers["the second one stays"] = "forward_one_chunk" in vars(stage)
        second.remove()
    before = coded.handles[0].stats().wire_bytes
    expected, found = plain.step(2)[0], coded.step(2)[0]
    answers["removed"] = torch.equal(plain.gradients(), coded.gradients()) and (
        rank == 0 or torch.equal(expected, found)
    )
    answers["removed: nothing counted"] = coded.handles[0].stats().wire_bytes == before

    # a resumed stage draws what an uninterrupted one draws
    once, first, second = (Pipeline("GPipe", both("int4")) for _ in range(3))
    for n in range(3):
        once.step(n)
    first.step(0)
    first.step(1)
    for stage, handle in zip(second.handles, first.handles, strict=True):
        stage.load_state_dict(copy.deepcopy(handle.state_dict()))
    second.step(2)
    answers["resumed"] = torch.equal(once.gradients(), second.gradients())
    again = Pipeline("GPipe", both("int4"))
    again.step(2)
    answers["drawn anew"] = rank == 1 or not torch.equal(once.gradients(), again.gradients())

    # what goes between the two stages of a rank is exact, and is not counted
    folded = Pipeline("ZBV", both("int8"))
    folded.step(0)
    sizes = [handle.stats().gradient_bytes for handle in folded.handles]
    one = 4 * 2 * TOKENS * WIDTH * folded.chunks  # all chunks' activations
    answers["own hops"] = sizes == [one, one]
    return answers


def test_every_way_of_using_a_pipeline(found: list[dict[str, Any]]) -> None:
    for answers in (answers["ways"] for answers in found):
        for what, answer in answers.items():
            if isinstance(answer, tuple):
                assert answer[0] < answer[1], (what, answer)
            else:
                assert answer, what


class Spoilt(nn.Module):
    """One activation that is sent, and one gradient, is `value`; `seen` is what came last from the other stage."""

    value = 0.0

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.inner, self.seen = index, part(index), torch.empty(0)

    def keep(self, came: torch.Tensor) -> None:
        self.seen = came.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bad = torch.zeros_like(x)
        bad[0, 0, 3] = self.value
        if self.index == 0:
            y: torch.Tensor = self.inner(x) + bad
            y.register_hook(self.keep)
            return y
        self.keep(x)
        x = x.nan_to_num(0, 0, 0)
        x.register_hook(lambda gradient: gradient + bad)
        return self.inner(x)


def spoilt(rank: int) -> dict[str, bool]:
    """Whether what is not finite arrives so, in both directions, and spoils no other token."""
    answers = {}
    for codec in (*BOUNDS, "fp8", "fp16"):
        for value in (torch.nan, torch.inf, -torch.inf):
            Spoilt.value = value
            pipeline = Pipeline("GPipe", both(codec), Spoilt)
            pipeline.step(0)
            seen: Any = pipeline.stages[0].submod.seen
            others = torch.cat([seen[0, 1:], seen[1]]).isfinite().all()
            answers[f"{codec}, {value}"] = not seen[0, 0, 3].isfinite() and bool(others)
    return answers


def test_what_is_not_finite_stays_so(found: list[dict[str, Any]]) -> None:
    for answers in (answers["spoilt"] for answers in found):
        assert len(answers) == 15 and all(answers.values()), answers


def unbiased(rank: int) -> float:
    """The mean of many gradients that were rounded at random, against the true one."""
    plain, coded = Pipeline("GPipe", None), Pipeline("GPipe", {"forward": "fp32", "backward": "int4"})
    plain.step(0)
    total = torch.zeros_like(plain.gradients())
    for _ in range(40):
        coded.step(0)
        total += coded.gradients()
    return error(total / 40, plain.gradients())


def test_gradients_are_rounded_without_bias(found: list[dict[str, Any]]) -> None:
    first, last = (answers["unbiased"] for answers in found)
    assert last < 1e-6  # nothing that it gets travels through the codec; sums of forty fp32 numbers
    assert 0 < first < 0.1  # one of them errs by some 0.3; 40 independent ones by a sixth of it


def exchanged(rank: int) -> list[list[str]]:
    """Of the batches of a step that send and receive: what is done with each message when the batch is run."""
    batches, run = [], dist.batch_isend_irecv

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        names = {dist.isend: "send", dist.irecv: "receive"}
        batches.append([names.get(operation.op, "under way") for operation in operations])
        return run(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", batch)
        for codec in ("fp32", "int8"):
            Pipeline("1F1B", both(codec)).step(0)
    return [names for names in batches if len(names) > 1]


def test_what_comes_is_asked_for_before_anything_is_sent(found: list[dict[str, Any]]) -> None:
    """Else gloo's notice that this rank is ready waits behind what it sends, and the two directions take turns."""
    first, last = (answers["exchanged"] for answers in found)
    assert first == [["send", "under way"]] * 6 and last == first  # three exchanges of four chunks, by codec


def complaints(rank: int) -> list[str]:
    messages = []

    def expect(kind: type[Exception], **options: Any) -> None:
        with pytest.raises(kind) as raised:
            comm.register(stage, **options)
        messages.append(str(raised.value))

    stage = pipelining.PipelineStage(part(rank), rank, 2, torch.device("cpu"))
    expect(ValueError, forward="onebit")
    expect(ValueError, backward="int9")
    expect(ValueError, block=100)
    expect(ValueError, block="all")
    expect(TypeError, error_feedback=True)
    expect(RuntimeError, forward="int8" if rank else "int4")
    handle = comm.register(stage)
    expect(RuntimeError)

    stage.fwd_cache[0] = (torch.zeros(2, 1, WIDTH).expand(2, TOKENS, WIDTH),), []
    stage.act_send_info = {0: [1 - rank]}
    with pytest.raises(ValueError) as raised:
        stage.get_fwd_send_ops(0)
    messages.append(str(raised.value))
    replicated = pipelining.PipelineStage(DDP(part(rank)), rank, 2, torch.device("cpu"))
    comm.register(replicated)
    with pytest.raises(RuntimeError) as raised:
        replicated.backward_one_chunk(0, full_backward=False, last_backward=False)
    messages.append(str(raised.value))
    for state in ({**handle.state_dict(), "stage": 5}, None, {**handle.state_dict(), "sent": "3"}):
        with pytest.raises(ValueError) as raised:
            handle.load_state_dict(state)
        messages.append(str(raised.value))
    return messages


def test_what_is_wrong_is_named(found: list[dict[str, Any]]) -> None:
    words = ["forward must be one of", "backward must be one of", "block", "block", "error_feedback"]
    words += ["rank 0 has forward int4, rank 1 has forward int8", "registered already"]
    words += ["output 0 of shape (2, 3, 256) is expanded", "under a zero-bubble schedule"]
    words += ["stage is 5", "NoneType is not what state_dict gave", "dict is not what state_dict gave"]
    for messages in (answers["complaints"] for answers in found):
        for word, message in zip(words, messages, strict=True):
            assert word in message


def lose_a_peer(rank: int, folder: str) -> None:
    pipeline = Pipeline("1F1B", both("int8"))
    pipeline.step(0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        pipeline.step(1)
    Path(folder, f"{rank}.json").write_text(json.dumps([str(raised.value), time.monotonic() - begin]))


def test_a_step_raises_when_a_peer_is_lost(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1: no answer"):
        run_ranks(2, lose_a_peer, str(tmp_path))
    message, seconds = json.loads((tmp_path / "0.json").read_text())
    assert "onnection" in message and seconds < AT_ONCE, (message, seconds)


def delayed(rank: int, name: str, steps: int) -> int:
    """Ranks sleep at random before each chunk, forwards and backwards; the steps that are done."""
    wait = random.Random(rank)

    class Sleepy(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.inner = part(index)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(wait.random() * 3e-3)
            y: torch.Tensor = self.inner(x)
            y.register_hook(lambda _: time.sleep(wait.random() * 3e-3))
            return y

    pipeline = Pipeline(name, both("int8"), Sleepy)
    for step in range(steps):
        time.sleep(wait.random() * 5e-3)
        pipeline.step(step)
    return pipeline.handles[0].stats().steps


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_delays_never_hang(name: str) -> None:
    assert run_ranks(2, delayed, name, 100) == [100, 100]


def hybrid(rank: int) -> dict[str, Any]:
    """Two pipelines of two stages, each stage averaged over the two: codecs on both wires."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    replica, index = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")

    def gradients(hook: str | None, codecs: dict[str, Any] | None) -> tuple[torch.Tensor, float]:
        model = DDP(part(index), process_group=mesh["dp"].get_group())
        stage = pipelining.PipelineStage(model, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
        handle = comm.register(model, hook) if hook else None
        if codecs is not None:
            comm.register(stage, **codecs)
        schedule = schedules.Schedule1F1B(stage, 4, loss_fn=nn.functional.mse_loss)
        for step in range(2):
            model.zero_grad()
            x, y = batch(2 * step + replica, 8)
            if index == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
        return torch.cat([p.grad.flatten() for p in model.parameters()]), handle.stats().ratio if handle else 1.0

    (true, _), (found, ratio) = gradients(None, None), gradients("int8", both("int8"))
    everyone = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(everyone, found, group=mesh["dp"].get_group())
    return {"error": error(found, true), "replicas alike": torch.equal(*everyone), "ratio": ratio}


@pytest.mark.slow
def test_pipelines_beside_each_other_with_codecs_on_both_wires() -> None:
    for answers in run_ranks(4, hybrid):
        assert answers["error"] < 0.05
        assert answers["replicas alike"]
        assert answers["ratio"] > 3
