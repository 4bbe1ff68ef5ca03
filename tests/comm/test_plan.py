"""`pykernels comm plan`: what it prints, what it draws, and what it says when it is held wrong."""

from __future__ import annotations

import pathlib
import re

import pytest
from typer.testing import CliRunner

from pykernels.cli.main import app
from pykernels.comm import command
from pykernels.comm.command import Site
from pykernels.comm.model import Speed

SPEEDS = {codec: Speed(5e-10, 5e-10, 2e-10) for codec in command.CODECS} | {"fp32": Speed(1e-10)}


def plan(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(
        app, ["comm", "plan", *map(str, arguments)], env={"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", done.output).split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100mbit", 12.5e6),
        ("1gbit", 125e6),
        ("10Gbit/s", 1.25e9),
        ("25GB/s", 25e9),
        ("1.5 Gbps", 187.5e6),
        ("64kbit", 8e3),
        ("1e3mbit", 125e6),
    ],
)
def test_rates(text: str, expected: float) -> None:
    assert command.bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "gbit", "1", "1gb", "1Gb/s", "1gbut", "-1gbit", "0gbit", "1.2.3gbit"])
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        command.bandwidth(text)


@pytest.mark.parametrize(("text", "expected"), [("50us", 5e-5), ("1.5ms", 1.5e-3), ("2s", 2.0), ("100 ns", 1e-7)])
def test_times(text: str, expected: float) -> None:
    assert command.duration(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "50", "us", "50min", "1.2.3s"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        command.duration(text)


def test_buckets_are_those_of_ddp() -> None:
    mebi = 1 << 18  # gradients of four bytes
    assert command.buckets(mebi + 2 * 25 * mebi + 5) == [mebi, 25 * mebi, 25 * mebi, 5]
    assert command.buckets(mebi + 25 * mebi) == [mebi, 25 * mebi]
    assert command.buckets(7) == [7]


def test_rows_agree_with_arithmetic() -> None:
    found = {row.codec: row for row in command.rows(25_000_000, Site(4, 12.5e6, 0.0), SPEEDS, 0.3)}
    wire = 1.5 * 4 * 25_000_000 / 12.5e6
    assert found["fp32"].sent == pytest.approx(1.5 * 4 * 25_000_000)
    assert wire <= found["fp32"].communication <= 1.01 * wire
    assert wire <= found["fp32"].step <= 1.01 * wire + 0.3
    assert found["fp32"].step / found["int8"].step == pytest.approx(4 * 256 / 260, rel=0.05)
    assert found["int4"].step < found["int8"].step < found["bf16"].step < found["fp32"].step


def test_more_ranks_or_less_bandwidth_never_take_less_time() -> None:
    for codec, speed in SPEEDS.items():
        steps = [
            command.rows(10_000_000, Site(world, 125e6, 5e-5), {codec: speed})[0].step for world in (2, 8, 64, 1024)
        ]
        assert steps == sorted(steps), codec
        slower = command.rows(10_000_000, Site(8, 12.5e6, 5e-5), {codec: speed})[0].step
        assert slower > steps[1]


def test_few_numbers_are_counted_one_by_one() -> None:
    """A hundredth of the gradients, 8 bytes to each other rank; 4 round a ring; two thin matrices of rank 4."""
    n, world = 1 << 20, 4
    found = {row.codec: row for row in command.rows(n, Site(world, 125e6, 0.0), SPEEDS)}
    hundredth = sum(round(numel / 100) for numel in command.buckets(n))
    assert found["topk"].sent == 3 * 8 * hundredth
    assert found["randomk"].sent == pytest.approx(1.5 * 4 * hundredth)
    assert found["powersgd"].sent == pytest.approx(1.5 * 4 * 2 * 4 * 1024)
    assert not any(f"{codec} 2-level" in found for codec in ("topk", "randomk", "powersgd"))
    # Selections go to everyone, sums do not.
    many = {row.codec: row for row in command.rows(n, Site(64, 125e6, 0.0), SPEEDS)}
    assert many["topk"].sent == 21 * found["topk"].sent
    assert many["randomk"].sent < 2 * found["randomk"].sent


def test_two_levels_send_from_a_host_what_one_rank_would() -> None:
    alone = {row.codec: row for row in command.rows(10_000_000, Site(8, 125e6, 0.0), SPEEDS)}
    hosts = {row.codec: row for row in command.rows(10_000_000, Site(32, 125e6, 0.0, 4), SPEEDS)}
    # Four ranks send a quarter each, so that the wire is as long busy as with one rank on each of the eight hosts.
    assert 4 * hosts["int8 2-level"].sent == pytest.approx(alone["int8"].sent, rel=0.01)
    assert hosts["int8 2-level"].communication == pytest.approx(alone["int8"].communication, rel=0.05)
    assert hosts["int8 2-level"].communication < 0.5 * hosts["int8"].communication
    assert "fp32 2-level" not in hosts and "int8 2-level" not in alone


def test_plan_measures_prints_and_draws(tmp_path: pathlib.Path) -> None:
    chart = tmp_path / "plan.png"
    text = plan("--params", "25e6", "--world", 64, "--link", "1gbit", "--compute-ms", 300, "--chart", chart)
    assert "25 M parameters, 64 ranks, 1gbit" in text
    sent = {codec: float(re.search(rf"\b{codec} ([\d.]+) ", text)[1]) for codec in command.CODECS}  # type: ignore[index]
    assert sent["fp32"] == pytest.approx(2 * 63 / 64 * 100, abs=0.01)
    assert sent["fp32"] > sent["bf16"] > sent["int8"] > sent["int4"] > sent["int2"] > sent["onebit"]
    assert sent["randomk"] == pytest.approx(0.01 * sent["fp32"], rel=0.01)
    for words in ("measured here", "ring all-reduce", "two thirds of the 300 ms", "link of its own"):
        assert words in text
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_plan_at_1024_ranks_on_shared_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", lambda world, tell: SPEEDS)
    text = plan("--params", "7e9", "--world", 1024, "--link", "25GB/s", "--ranks-per-host", 8)
    assert "The 8 ranks of a host share its link" in text
    assert "int8 2-level" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--link": "1gbut"}, "--link: '1gbut' is not a rate"),
        ({"--latency": "5"}, "--latency: '5' is not a time"),
        ({"--params": "many"}, "--params: "),
        ({"--params": "0"}, "--params: 0 is not a number of parameters"),
        ({"--params": "nan"}, "--params: nan is not a number of parameters"),
        ({"--ranks-per-host": "3"}, "--ranks-per-host: 3 does not divide --world 64"),
        ({"--world": "1"}, "Invalid value for '--world'"),
        ({"--chart": "absent/plan.png"}, "--chart: the folder absent does not exist"),
    ],
)
def test_plan_names_the_option_that_is_wrong(changed: dict[str, str], message: str) -> None:
    given = {"--params": "25e6", "--world": "64", "--link": "1gbit"} | changed
    assert message in plan(*(part for pair in given.items() for part in pair), status=2)
