"""`pykernels comm plan-pipeline` and `plan-tensor`, and the model behind them."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from pykernels.cli.main import app
from pykernels.comm.model import Link, Speed
from pykernels.parallel import STAGE_CODECS, command
from pykernels.parallel.model import Hop, chunk_order, pipeline_seconds, predict_sum

SPEEDS = {codec: Speed(1e-10, 1e-10, 1e-10) for codec in STAGE_CODECS}
FREE = Hop(0.0, 0.0, 0.0, 0.0)


def plan(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(
        app, ["comm", *map(str, arguments)], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", done.output).split())


def test_a_stage_goes_through_its_chunks_in_torchs_order() -> None:
    f, b = "forward", "backward"
    assert chunk_order("gpipe", 2, 2, 1) == [(f, 0), (f, 1), (b, 0), (b, 1)]
    assert chunk_order("1f1b", 2, 3, 0) == [(f, 0), (f, 1), (b, 0), (f, 2), (b, 1), (b, 2)]
    assert chunk_order("1f1b", 2, 3, 1) == [(f, 0), (b, 0), (f, 1), (b, 1), (f, 2), (b, 2)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (3, 5), (4, 16)])
def test_without_a_wire_a_step_is_its_chunks_and_the_bubble(schedule: str, stages: int, chunks: int) -> None:
    assert pipeline_seconds(schedule, stages, chunks, 1.0, 2.0, FREE) == pytest.approx(3 * (chunks + stages - 1))


def test_where_nothing_but_bytes_take_time() -> None:
    hop = Hop(0.0, 1.0, 0.0, 0.0)
    # GPipe of two stages: all activations one way, then all gradients the other way
    assert pipeline_seconds("gpipe", 2, 8, 0.0, 0.0, hop) == 16
    # 1F1B: both ways at once, but for the first activations and the last gradients
    assert pipeline_seconds("1f1b", 2, 8, 0.0, 0.0, hop) == 9
    # a stage in the middle hands on what it receives meanwhile
    assert pipeline_seconds("gpipe", 3, 8, 0.0, 0.0, hop) == 18


def test_encoding_and_decoding_take_the_stages_time() -> None:
    # two stages, one chunk: encode, wire, latency, decode, both ways
    assert pipeline_seconds("gpipe", 2, 1, 1.0, 2.0, Hop(0.1, 1.0, 0.5, 0.2)) == pytest.approx(2 * 3 + 2 * 1.8)
    # most of a short wire's time passes while stages compute
    assert 3 * 9 < pipeline_seconds("1f1b", 2, 8, 1.0, 2.0, Hop(0.0, 0.5, 0.0, 0.0)) < 3 * 9 + 16 * 0.5


def test_two_ranks_sum_in_one_exchange_and_more_in_two() -> None:
    link = Link.between(2, 125e6, 0.0)
    times, sent = predict_sum("int8", 1 << 20, 256, 2, link, SPEEDS["int8"])
    assert sent == pytest.approx((1 << 20) * 260 / 256) and times.gather == times.reduce == 0
    assert times.exchange == pytest.approx(sent / 125e6)
    times, sent = predict_sum("int8", 1 << 20, 256, 4, Link.between(4, 125e6, 0.0), SPEEDS["int8"])
    assert sent == pytest.approx(1.5 * (1 << 20) * 260 / 256, rel=0.01) and times.gather > 0
    times, sent = predict_sum("fp32", 1 << 20, 256, 4, Link.between(4, 125e6, 0.0), SPEEDS["fp32"])
    assert sent == pytest.approx(1.5 * 4 * (1 << 20)) and times.encode == 0


def test_the_commands_measure_and_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda numel, world=2: SPEEDS)
    text = plan("plan-pipeline", "--elements", "1048576", "--stages", 4, "--chunks", 8, "--link", "100mbit")
    sent = {codec: float(re.search(rf"\b{codec} ([\d.]+) ", text)[1]) for codec in STAGE_CODECS}  # type: ignore[index]
    assert sent["fp32"] == pytest.approx(2 * 8 * 4.194304, abs=0.01)
    assert sent["int8"] / sent["fp32"] == pytest.approx(0.254, abs=0.001)
    text = plan("plan-tensor", "--elements", "1e6", "--sums", 2, "--world", 2, "--link", "100mbit")
    assert float(re.search(r"\bfp32 ([\d.]+) ([\d.]+) ", text)[2]) == pytest.approx(2 * 4e6 / 12.5e3, rel=0.01)  # type: ignore[index]
    text = plan("plan-tensor", "--elements", "4096", "--sums", 2, "--world", 2, "--link", "100mbit")
    assert "fewer than 8192 elements travel as fp32" in text


def test_the_speed_of_each_codec_is_measured() -> None:
    speeds = command.measure(1 << 14)
    assert list(speeds) == list(STAGE_CODECS)
    assert all(speed.encode > 0 for speed in speeds.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--schedule": "zbv"}, "--schedule: one of gpipe, 1f1b, not zbv"),
        ({"--chunks": "1"}, "--chunks: 1f1b needs at least as many as --stages (2), not 1"),
        ({"--elements": "some"}, "--elements: "),
        ({"--elements": "0"}, "--elements: 0 is not a number of elements"),
        ({"--link": "fast"}, "--link: 'fast' is not a rate"),
    ],
)
def test_the_option_that_is_wrong_is_named(changed: dict[str, str], message: str) -> None:
    given = {"--elements": "1e6", "--stages": "2", "--link": "1gbit"} | changed
    assert message in plan("plan-pipeline", *(part for pair in given.items() for part in pair), status=2)
