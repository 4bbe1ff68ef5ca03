"""Whether networks learn with compressed gradients: scikit-learn's digits, in seconds; benchmarks/comm/convergence.py
does it at length.
"""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch import nn

from benchmarks.comm.convergence import Replicas, train
from examples.images import load

NO_FEEDBACK = "onebit:error_feedback=False"
HOOKS = ["none", "int8", "int4", "onebit", NO_FEEDBACK]
NEAR = 0.02  # of accuracy: 7 of 360 images, about twice what one seed differs from another
FAR = 0.05


def perceptron() -> nn.Sequential:
    """No norms, which would make up for wrong magnitudes."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def learn(rank: int) -> dict[str, float]:
    images = load("digits")
    options = {"seed": 0, "epochs": 10, "batch": 16, "lr": 0.3, "momentum": 0.0}
    return {hook: train(images, Replicas(perceptron(), hook), hook, **options)["accuracy"] for hook in HOOKS}


def test_error_feedback_is_what_makes_signs_learn() -> None:
    accuracies = run_ranks(2, learn)[0]
    exact = accuracies["none"]
    assert exact > 0.9
    for hook in ("int8", "int4", "onebit"):
        assert accuracies[hook] > exact - NEAR, accuracies
    assert accuracies[NO_FEEDBACK] < exact - FAR, accuracies
