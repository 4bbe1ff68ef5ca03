"""Which networks `pk.compress` tries, in which order, which it takes, and what it says of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pykernels as pk
from pykernels.compress import Interrupted, Stopped

from .pretend import Model, World, pretended

X = torch.zeros(1, 4)
DATA = [torch.zeros(4, 4) for _ in range(8)]


def run(world: World, **options: Any) -> tuple[pk.Compressed, list[str]]:
    """The result, and what was done for it."""
    options = {"data": DATA, "validate": world.validate, **options}
    with pretended(world):
        found = pk.compress(Model(), (X,), **options)
    return found, world.calls


def verdicts(found: pk.Compressed) -> list[str]:
    return [row.verdict for row in found.report().rows]


def test_int8_that_keeps_the_budget_ends_the_search() -> None:
    found, calls = run(World(), budget={"latency": 0.5, "drop": 0.01})
    assert calls == ["fp32 of 1.00", "int8 of 1.00"]
    assert found.recipe == {"version": 1, "prune": None, "distil": None, "precision": "int8"}
    assert verdicts(found) == ["the original", "chosen"] and found.model.part == 1.0


def test_precisions_are_chosen_by_step_where_int8_loses_too_much() -> None:
    world = World(lost={"fp32": 0.0, "int8": 0.05, "auto": 0.008})
    found, calls = run(world, budget={"latency": 0.6, "drop": 0.01})
    assert calls == ["fp32 of 1.00", "int8 of 1.00", "auto of 1.00"]
    assert world.options["auto of 1.00"]["budget"] == {"drop": 0.01}
    assert verdicts(found) == ["the original", "loses too much", "chosen"]
    assert "auto (mixed)" in str(found.report())
    assert found.recipe["precision"] == {"linear": "int8"}  # what was chosen, which nothing chooses anew
    again, calls = run(world, recipe=found.recipe)
    assert again.recipe == found.recipe and verdicts(again) == ["the original", "chosen"]


def fragile() -> World:
    """Pruned to 0.6 it loses 0.02, and half of that when it was distilled."""
    return World(lost_by_pruning=lambda part: 0.05 * (1.0 - part))


def test_what_is_missing_is_pruned_and_distilled() -> None:
    found, calls = run(fragile(), budget={"latency": 0.3, "drop": 0.015}, train=DATA, steps=120)
    assert calls[2:] == ["prune to 0.60", "fp32 of 0.60", "distil 50", "distil 50", "distil 20", "int8 of 0.60"]
    assert found.recipe["prune"] == {"version": 1, "part": 0.6} and found.recipe["distil"] == {"steps": 120}
    assert verdicts(found) == ["the original", "too slow", "loses too much", "chosen"]
    assert [row.name for row in found.report().rows[2:]] == [
        "pruned to 0.60, fp32",
        "pruned to 0.60, distilled 120 steps, int8",
    ]


def test_a_student_that_only_floats_hold_is_measured_once_in_fp32() -> None:
    """Pruned it keeps the drop in fp32 and not in int8; distilled, it keeps it in both."""
    world = World(lost_by_pruning=lambda part: 0.012 if part < 1 else 0.0)
    found, calls = run(world, budget={"latency": 0.3, "drop": 0.013}, train=DATA, steps=10)
    assert calls[2:] == [
        "prune to 0.60", "fp32 of 0.60", "int8 of 0.60", "auto of 0.60", "distil 10", "int8 of 0.60",
    ]  # fmt: skip
    assert found.recipe["distil"] == {"steps": 10} and verdicts(found)[-1] == "chosen"


def test_nothing_is_trained_where_pruning_loses_little_enough() -> None:
    found, calls = run(World(), budget={"latency": 0.3, "drop": 0.02}, train=DATA, steps=120)
    assert calls[2:] == ["prune to 0.60", "fp32 of 0.60", "int8 of 0.60"] and found.recipe["distil"] is None


def test_distillation_that_does_harm_is_turned_down() -> None:
    class Harmful(World):
        def validate(self, network: Any) -> float:
            return super().validate(network) - (0.3 if network.steps else 0.0)

    found, calls = run(Harmful(), budget={"latency": 0.3}, train=DATA, steps=10)
    assert calls[2:] == ["prune to 0.60", "fp32 of 0.60", "distil 10", "int8 of 0.60", "int8 of 0.60"]
    assert found.recipe["distil"] is None and found.report().rows[-1].verdict == "chosen"


def test_without_training_data_nothing_is_distilled() -> None:
    found, calls = run(World(), budget={"latency": 0.3, "drop": 0.02})
    assert calls[2:] == ["prune to 0.60", "int8 of 0.60"] and found.recipe["distil"] is None


def test_a_student_that_int8_hurts_gets_what_the_drop_leaves() -> None:
    """The student has lost 0.008 in fp32; of 0.011 that leaves 0.003 for precisions by step."""
    world = World(lost_by_pruning=lambda part: 0.008 if part < 1 else 0.0)
    with pytest.raises(Stopped):  # auto takes 0.6 * 0.6 of the time
        run(world, budget={"latency": 0.3, "drop": 0.011}, rounds=1)
    assert world.calls[2:] == ["prune to 0.60", "int8 of 0.60", "fp32 of 0.60", "auto of 0.60"]
    assert world.options["auto of 0.60"]["budget"]["drop"] == pytest.approx(0.003)


def test_what_loses_too_much_is_followed_by_less() -> None:
    """No network keeps both; what comes out is the quickest that does not lose too much."""
    world = World()
    with pytest.raises(
        Stopped, match=r"^budget: no network that was made takes at most 0.2 .* loses at most 0.01"
    ) as e:
        run(world, budget={"latency": 0.2, "drop": 0.01}, rounds=3)
    assert [call for call in world.calls if call.startswith("prune")] == [
        "prune to 0.40", "prune to 0.70", "prune to 0.55",
    ]  # fmt: skip
    found = e.value.result
    assert found.model.part == 0.7 and found.report().rows[found.report().chosen].quality >= 0.89
    assert "loses too much" in verdicts(found) and "too slow" in verdicts(found)


def test_without_a_latency_it_is_as_quick_as_the_drop_allows() -> None:
    world = World(lost={"fp32": 0.0, "int8": 0.004, "auto": 0.004})
    found, calls = run(world, budget={"drop": 0.0115}, rounds=4)
    parts = [float(call.split()[-1]) for call in calls if call.startswith("prune")]
    assert parts == [0.7, 0.49, 0.59, 0.65] and found.model.part == pytest.approx(0.6475)  # 0.625 would just do


def test_without_a_drop_nothing_is_too_much() -> None:
    found, calls = run(World(), budget={"latency": 0.25})
    assert calls[2:] == ["prune to 0.50", "int8 of 0.50"] and verdicts(found)[-1] == "chosen"


def test_without_data_no_precision_needs_them_and_channels_are_weighed_by_magnitude() -> None:
    world = World()
    found, calls = run(world, data=None, budget={"latency": 0.6, "drop": 0.02})
    assert calls == ["fp32 of 1.00", "bf16 of 1.00", "prune to 0.75", "bf16 of 0.75"]
    assert world.options["prune to 0.75"]["importance"] == "magnitude"
    assert any("no data" in note for note in found.report().notes)


def test_a_part_that_cannot_be_reached_is_followed_by_a_larger_one() -> None:
    world = World(least=0.5)
    found, calls = run(world, budget={"drop": 0.1}, rounds=3)
    assert [c for c in calls if c.startswith("prune")] == ["prune to 0.70", "prune to 0.49", "prune to 0.59"]
    assert found.report().refused == ["pruned to 0.49: latency: 0.490 cannot be reached: ..."]
    assert "turned down: pruned to 0.49" in str(found.report())


def test_a_model_that_cannot_be_pruned_is_tried_once() -> None:
    world = World(hopeless="model: channels cannot be removed from 'qkv'")
    found, calls = run(world, budget={"drop": 0.1})
    assert calls.count("prune to 0.70") == 1 and found.recipe["prune"] is None
    assert "cannot be removed from 'qkv'" in found.report().refused[0]


def test_an_interrupt_keeps_what_was_reached() -> None:
    class Impatient(World):
        def prune(self, *args: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(Impatient(), budget={"drop": 0.1})
    assert isinstance(caught.value, Interrupted) and caught.value.result.recipe["precision"] == "int8"


def test_a_failure_later_on_keeps_what_was_reached() -> None:
    class Broken(World):
        def validate(self, network: Any) -> Any:
            return "good" if network.part < 1 else super().validate(network)

    with pytest.raises(Stopped, match=r"^validate: it returned str, not a number") as caught:
        run(Broken(), budget={"drop": 0.1})
    assert caught.value.result.recipe["precision"] == "int8"


def test_a_recipe_is_done_again_without_a_search() -> None:
    first, _ = run(fragile(), budget={"latency": 0.3, "drop": 0.015}, train=DATA, steps=70)
    again, calls = run(World(), recipe=first.recipe, train=DATA)
    assert calls == ["fp32 of 1.00", "prune to 0.60", "distil 50", "distil 20", "int8 of 0.60"]
    assert again.recipe == first.recipe and verdicts(again) == ["the original", "chosen"]
    without, calls = run(World(), recipe=first.recipe)
    assert "distil 50" not in calls and any("without train" in note for note in without.report().notes)
    assert without.recipe["distil"] is None


def test_progress_names_the_stage() -> None:
    seen: list[tuple[str, int, int]] = []

    class Slow(World):
        def distill(self, *args: Any, progress: Any, **options: Any) -> Any:
            progress("distilling", 1, 50)
            return super().distill(*args, **options)

    run(Slow(), budget={"latency": 0.3}, train=DATA, steps=70, progress=lambda *a: seen.append(a))
    assert seen == [("pruned to 0.60: distilling", 1, 70), ("pruned to 0.60: distilling", 51, 70)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": None, "validate": None}, "data: there is nothing to judge by"),
        ({"data": []}, "data: it is empty"),
        ({"data": iter(DATA)}, "data: an iterator can be read once only"),
        ({"data": 3}, "data: a loader or a list of batches is needed, not one int"),
        ({"data": DATA[0]}, "data: a loader or a list of batches is needed, not one"),
        ({"keep": "0"}, "keep: a list of names of modules is needed, not '0'"),
        ({"checkpoint": 3}, "checkpoint: the path of a folder is needed, not int"),
        ({"checkpoint": __file__}, "checkpoint: .* is no folder"),
        ({"data": [torch.zeros(2, 4), torch.zeros(2, 5)]}, r"data: input 0 of entry 1 is torch.float32 \[2, 5\]"),
        ({"data": DATA[:1], "validate": None}, "data: it has one entry"),
        ({"train": [], "data": None}, "train: it is empty"),
        ({"train": DATA, "steps": 0}, "steps: a whole number above 0"),
        ({"steps": 5}, "steps: without train nothing is distilled"),
        ({"train": DATA, "labels": 2.0}, "labels: a weight from 0 to 1"),
        ({"train": DATA, "labels": "x"}, "labels: a weight from 0 to 1 is needed, not 'x'"),
        ({"train": DATA, "optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizer: .* not SGD"),
        ({"validate": 0.9}, "validate: expected a function"),
        ({"rounds": -1}, "rounds: a whole number"),
        ({"budget": {}}, "budget: expected a dictionary with latency, drop, or both"),
        ({"budget": {"ms": 3}}, "budget: expected a dictionary with latency, drop, or both"),
        ({"budget": {"latency": 1.5}}, "budget: 'latency' is 1.5; it is a part"),
        ({"budget": {"drop": -0.1}}, "budget: 'drop' is -0.1; it must not be negative"),
        ({"budget": {"drop": True}}, "budget: 'drop' is True, not a number"),
        ({"recipe": {"version": 2}}, "recipe: a dictionary of version 1"),
        ({"recipe": {"version": 1, "precision": "int4"}}, "recipe: precision 'int4' is none of"),
        ({"recipe": {"version": 1, "precision": "auto"}}, "recipe: precision 'auto' is none of"),
        ({"recipe": {"version": 1, "precision": "int8", "distil": {"steps": 0}}}, "recipe: 'distil' must have steps"),
        ({"recipe": {"version": 1, "precision": "int8", "prune": 3}}, "recipe: 'prune' must be"),
        ({"recipe": {"version": 1, "precision": "int8"}, "budget": {"drop": 0.1}}, "budget: a recipe leaves nothing"),
        (
            {"recipe": {"version": 1, "precision": "int8"}, "data": None},
            "data: the recipe's precision, int8, needs some",
        ),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(World(), **options)
    assert not isinstance(caught.value, Stopped)


def test_a_loader_that_changes_its_shapes_on_the_way_keeps_what_was_reached() -> None:
    class Reads(World):
        def distill(self, student: Any, teacher: Any, loader: Any, steps: int, **options: Any) -> Any:
            for _ in zip(range(steps), loader, strict=False):
                pass
            return []

    train = [torch.zeros(2, 4)] * 60 + [torch.zeros(2, 4, dtype=torch.float64)]
    with pytest.raises(Stopped, match=r"train: input 0 of entry 60 is torch.float64 \[2, 4\], the example's") as caught:
        run(Reads(), budget={"latency": 0.3}, train=train, steps=70)
    assert caught.value.result.recipe["precision"] == "int8"
