"""pk.distill: a student learns a teacher's answers; what cannot be done is said, and what was reached is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels.distil import Features, Stopped
from pykernels.quantization import prepare_qat


def classifier(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, 2), nn.ReLU(), nn.Dropout(0.1)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 6),
    )  # fmt: skip


def teacher() -> nn.Module:
    model = classifier(24)
    nn.init.normal_(model[4].weight, std=2.0)  # answers that differ from image to image
    return model.eval()


def batches(count: int = 4, labels: bool = False) -> list[Any]:
    torch.manual_seed(7)
    found = [torch.randn(16, 3, 8, 8) for _ in range(count)]
    return [(x, torch.randint(0, 6, (16,))) for x in found] if labels else found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_student_comes_closer() -> None:
    student, whole = classifier(8), teacher()
    student.eval()
    student[1].train()
    before, told = state(whole), []
    losses = pk.distill(
        student, whole, batches(), 60, optimizer=torch.optim.Adam(student.parameters(), 1e-2), temperature=2.0,
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert len(losses) == 60 and sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert told[0] == ("distilling", 1, 60) and told[-1] == ("distilling", 60, 60)
    assert same(before, whole.state_dict()) and not whole.training
    assert not student[0].training and student[1].training  # each module is in its own mode again
    assert int(student[0][1].num_batches_tracked) == 60  # and was in training meanwhile


def test_the_loss_is_the_divergence_of_softened_answers() -> None:
    student, whole, (x, y) = classifier(8).eval(), teacher(), batches(1, labels=True)[0]
    student[1][2].p = 0.0
    with torch.no_grad():
        ours, theirs = copy.deepcopy(student).train()(x), whole(x)
    p, log_p, log_q = (theirs / 3).softmax(1), (theirs / 3).log_softmax(1), (ours / 3).log_softmax(1)
    divergence = 9 * (p * (log_p - log_q)).sum(1).mean()
    entropy = F.cross_entropy(ours, y)
    for labels, expected in ((0.0, divergence), (0.25, 0.75 * divergence + 0.25 * entropy)):
        (loss,) = pk.distill(copy.deepcopy(student), whole, [(x, y)], 1, temperature=3.0, labels=labels)
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_images_of_classes_and_rows_of_tokens() -> None:
    x = torch.randn(2, 3, 5, 5)
    ours, theirs = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        a, b = (m(x).permute(0, 2, 3, 1).log_softmax(-1) for m in (ours, theirs))
    (loss,) = pk.distill(ours, theirs, [x], 1, temperature=1.0)
    assert loss == pytest.approx(float((b.exp() * (b - a)).sum() / 2), rel=1e-5)
    x = torch.randn(2, 5, 3)
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    with torch.no_grad():
        a, b = (m(x).log_softmax(-1) for m in (ours, theirs))
    (loss,) = pk.distill(ours, theirs, [x], 1, temperature=1.0)
    assert loss == pytest.approx(float((b.exp() * (b - a)).sum() / 2), rel=1e-5)


def test_features_of_another_width_are_mapped_and_gone_on_with() -> None:
    student, whole = classifier(8), teacher()
    features = Features({"0": "0", "1": "1"}, weight=10.0)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    first = pk.distill(student, whole, batches(), 30, features=features, optimizer=optimizer)
    shapes = {name: list(p.shape) for name, p in features.projections.items()}
    assert shapes == {"0": [8, 24], "1": [8, 24]}
    before = {name: p.clone() for name, p in features.projections.items()}
    more = pk.distill(student, whole, batches(), 10, features=features, optimizer=optimizer)
    assert more[0] < first[0] and any(not torch.equal(before[n], p) for n, p in features.projections.items())
    alike = Features({"0": "0"}).forward({"0": torch.ones(2, 4, 3, 3)}, {"0": torch.zeros(2, 4, 3, 3)})
    assert float(alike) == 1.0


def test_going_on_is_one_run() -> None:
    """Two calls with the caller's optimizer and scheduler end where one of as many steps does."""
    ends = []
    for parts in ((8,), (3, 5)):
        student, whole = classifier(8), teacher()
        student[1][2].p = 0.0
        optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)
        data, losses, at = batches(8), [], 0
        for steps in parts:
            losses += pk.distill(student, whole, data[at : at + steps], steps, optimizer=optimizer, scheduler=scheduler)
            at += steps
        ends.append((losses, state(student), scheduler.get_last_lr()))
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]


def test_a_loss_of_ones_own_gets_answers_and_labels() -> None:
    seen = []

    def loss(answer: torch.Tensor, target: torch.Tensor, label: Any) -> torch.Tensor:
        seen.append((answer.requires_grad, target.requires_grad, None if label is None else label.shape))
        return F.mse_loss(answer, target)

    pk.distill(classifier(8), teacher(), batches(1, labels=True), 1, loss=loss)
    pk.distill(classifier(8), teacher(), batches(1), 1, loss=loss)
    assert seen == [(True, False, torch.Size([16])), (True, False, None)]


@pytest.mark.parametrize("freeze", [True, False])
def test_statistics_of_batch_norms_can_stay(freeze: bool) -> None:
    student = classifier(8)
    norm = student[0][1]
    mean, weight = norm.running_mean.clone(), norm.weight.clone()
    pk.distill(student, teacher(), batches(), steps=2, freeze_norms=freeze)
    assert torch.equal(norm.running_mean, mean) == freeze
    assert not torch.equal(norm.weight, weight) and norm.training


def test_a_teacher_on_our_kernels() -> None:
    whole = teacher()
    x = batches(1)[0]
    losses = [pk.distill(classifier(8), t, [x], 3)[0] for t in (whole, pk.optimize(whole, (x,)))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_student_with_fake_quantization() -> None:
    whole = teacher()
    prepared = prepare_qat(whole, (batches(1)[0],))
    before = state(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    loader = [*batches(3), batches(1)[0][:5]]  # the last batch is smaller
    losses = pk.distill(prepared, whole, loader, 8, optimizer=optimizer)
    assert len(losses) == 8 and not same(before, prepared.state_dict())


def test_a_student_with_swapped_layers() -> None:
    student, whole = classifier(8), teacher()
    pk.swap(student)
    losses = pk.distill(student, whole, batches(), 20, optimizer=torch.optim.Adam(student.parameters(), 1e-2))
    assert losses[-1] < losses[0]


def test_a_pruned_student() -> None:
    whole = teacher()
    layers = {"0.0": {"out": list(range(16))}, "0.1": {"out": list(range(16))}, "1.0": {"in": list(range(16))}}
    recipe = {
        "version": 1, "blocks": [],
        "layers": {n: {axis: {"of": 24, "kept": kept} for axis, kept in axes.items()} for n, axes in layers.items()},
    }  # fmt: skip
    small = pk.prune(whole, (batches(1)[0],), recipe=recipe).model
    losses = pk.distill(small, whole, batches(), 30, optimizer=torch.optim.Adam(small.parameters(), 3e-3))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps: a whole number above 0"),
        ({"temperature": 0.0}, "temperature: a number above 0"),
        ({"temperature": "4"}, "temperature: a number above 0"),
        ({"temperature": float("inf")}, "temperature: a number above 0"),
        ({"labels": "x"}, "labels: a weight from 0 to 1"),
        ({"loader": 3}, "loader: a loader or a list of batches is needed, not one int"),
        ({"loader": batches(1)[0]}, "loader: a loader or a list of batches is needed, not one Tensor"),
        ({"loss": "ce"}, "loss: expected a function"),
        ({"features": "0"}, "features: a dictionary of names of modules is needed, not str"),
        ({"optimizer": torch.optim.SGD}, "optimizer: an optimizer over the student's parameters"),
        ({"labels": 1.5}, "labels: a weight from 0 to 1"),
        ({"labels": 0.5, "loss": F.mse_loss}, "labels: a loss of your own"),
        ({"loader": []}, "loader: it is empty"),
        ({"features": {}}, "features: no pairs"),
        ({"features": {"9": "0"}}, "features: the student has no module '9'"),
        ({"features": {"0": "9"}}, "features: the teacher has no module '9'"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    given = {"loader": batches(), "steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        pk.distill(classifier(8), teacher(), **given)


def test_a_student_that_cannot_learn_and_a_teacher_that_would() -> None:
    with pytest.raises(ValueError, match=r"student: an nn\.Module is needed"):
        pk.distill(None, teacher(), batches(), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"teacher: an nn\.Module is needed"):
        pk.distill(classifier(8), lambda x: x, batches(), 1)  # type: ignore[arg-type]
    frozen = classifier(8).requires_grad_(False)
    with pytest.raises(ValueError, match="student: none of its parameters"):
        pk.distill(frozen, teacher(), batches(), 1)
    whole = teacher()
    with pytest.raises(ValueError, match="teacher: it shares modules"):
        pk.distill(nn.Sequential(whole[0], whole[1]), whole, batches(), 1)


class Sqrt(nn.Module):
    """Finite answers whose gradients are not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None] + self.weight.sqrt()


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((4, 3, 8, 8), torch.nan), "the loss is nan"),
        (torch.randn(4, 5, 8, 8), r"entry 3, of shapes \[\[4, 5, 8, 8\]\]: RuntimeError"),
        ({"x": 1}, "entry 3, .*a dict; a tensor is needed"),
    ],
)
def test_a_bad_entry_stops_and_leaves_what_was_reached(bad: Any, message: str) -> None:
    """The student, statistics included, and the optimizer are those of the steps before."""
    ends = []
    for loader in ([*batches(3), bad], batches(3)):
        student = classifier(8)
        student[1][2].p = 0.0
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        if len(loader) == 4:
            with pytest.raises(Stopped, match=message) as error:
                pk.distill(student, teacher(), loader, 10, optimizer=optimizer)
            assert len(error.value.losses) == 3 and "3 steps were made and are kept" in str(error.value)
            assert student.training and all(p.grad is None for p in student.parameters())
        else:
            pk.distill(student, teacher(), loader, 3, optimizer=optimizer)
        ends.append((state(student), optimizer.state_dict()["state"][0]["exp_avg"]))
    assert same(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])


def test_gradients_that_are_not_finite_stop_it() -> None:
    student = Sqrt()
    with pytest.raises(Stopped, match="the gradients are not finite"):
        pk.distill(student, teacher(), batches(1), 1)
    assert torch.equal(student.weight, torch.zeros(6))


def test_answers_of_other_shapes_and_missing_labels() -> None:
    with pytest.raises(Stopped, match=r"the student answers \[16, 8\], the teacher \[16, 6\]"):
        pk.distill(classifier(8)[:4], teacher(), batches(1), 1)
    with pytest.raises(Stopped, match="the entry has no label"):
        pk.distill(classifier(8), teacher(), batches(1), 1, labels=0.5)
    with pytest.raises(Stopped, match="features: '1' gives"):
        pk.distill(classifier(8), teacher(), batches(1), 1, features={"1": "0"})
    with pytest.raises(Stopped, match="it must give a scalar"):
        pk.distill(classifier(8), teacher(), batches(1), 1, loss=lambda a, b, _: a - b)


def test_an_iterator_that_ends() -> None:
    def once() -> Iterator[torch.Tensor]:
        yield from batches(3)

    with pytest.raises(Stopped, match="give a loader or a list") as error:
        pk.distill(classifier(8), teacher(), once(), 5)
    assert len(error.value.losses) == 3
    assert len(pk.distill(classifier(8), teacher(), once(), 3)) == 3
