"""Names, dtypes and sizes of a network's inputs and outputs, and requests that do not fit them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import pykernels as pk
from pykernels.serve.errors import Invalid
from pykernels.serve.signature import Signature, Spec
from tests.networks import Function


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, offset: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(image) + offset, "total": image.sum(1)}


@pytest.fixture(scope="module")
def named() -> Signature:
    return Signature.of(pk.optimize(Named(), (torch.randn(2, 4), torch.randn(2, 3))))


def test_inputs_are_named_as_the_model_names_them_and_outputs_by_their_keys(named: Signature) -> None:
    assert named.inputs == (Spec("image", torch.float32, (-1, 4)), Spec("offset", torch.float32, (-1, 3)))
    assert named.outputs == (Spec("logits", torch.float32, (-1, 3)), Spec("total", torch.float32, (-1,)))
    assert named.batched


def test_outputs_without_keys_are_numbered() -> None:
    two = pk.optimize(Function(lambda m, x: (m.a(x), x), a=nn.Linear(4, 3)), (torch.randn(2, 4),))
    assert [spec.name for spec in Signature.of(two).outputs] == ["output_0", "output_1"]


def test_a_loaded_network_has_the_same_signature(tmp_path) -> None:  # type: ignore[no-untyped-def]
    network = pk.optimize(Named(), {"image": torch.randn(2, 4), "offset": torch.randn(2, 3)})
    network.save(tmp_path / "net.pk")
    assert Signature.of(pk.load(tmp_path / "net.pk")) == Signature.of(network)


def test_a_fixed_batch_size_is_not_batched() -> None:
    found = Signature.of(pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_batch=False))
    assert not found.batched
    assert found.inputs[0].shape == (2, 4)
    assert found.request({found.inputs[0].name: torch.zeros(2, 4)}).rows is None


def test_sizes_that_are_free_besides_the_batch_are_free_in_outputs() -> None:
    sizes = ({0: Dim("batch"), 1: Dim("length")},)
    network = pk.optimize(nn.Embedding(5, 4), (torch.zeros(2, 3, dtype=torch.int64),), dynamic_shapes=sizes)
    found = Signature.of(network)
    assert found.inputs[0].shape == (-1, -1)
    assert found.outputs[0].shape == (-1, -1, 4)


def test_whole_numbers_that_are_places_in_a_table_of_one_are_zero() -> None:
    network = pk.optimize(nn.Embedding(1, 4), (torch.zeros(2, 3, dtype=torch.int64),))
    assert not Signature.of(network).ones


def test_a_network_whose_inputs_cannot_be_sent_is_refused() -> None:
    network = pk.optimize(Function(lambda m, x: x.abs()), (torch.zeros(2, 3, dtype=torch.complex64),))
    with pytest.raises(ValueError, match=r"network: input .* is no tensor of a dtype that can be sent"):
        Signature.of(network)


def test_a_request_has_inputs_in_the_networks_order(named: Signature) -> None:
    request = named.request({"offset": torch.ones(2, 3), "image": torch.zeros(2, 4)})
    assert [tuple(x.shape) for x in request.inputs] == [(2, 4), (2, 3)]
    assert request.rows == 2 and request.key == ((4,), (3,))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "input 'image' is missing; the inputs are image, offset"),
        ({"other": torch.zeros(1)}, "input 'other' is unknown; the inputs are image, offset"),
        ({"image": torch.zeros(2, 4, dtype=torch.float16)}, "input 'image' must be FP32, not FP16"),
        ({"image": torch.zeros(2, 5)}, r"input 'image' must have shape \[-1, 4\], .* not \[2, 5\]"),
        ({"image": torch.zeros(2, 4, 1)}, r"input 'image' must have shape \[-1, 4\], .* not \[2, 4, 1\]"),
        ({"image": torch.zeros(0, 4)}, r"input 'image' must have shape \[-1, 4\], .* not \[0, 4\]"),
        ({"offset": torch.zeros(3, 3)}, "input 'offset' has 3 rows, but 'image' has 2"),
    ],
)
def test_what_does_not_fit_is_named(named: Signature, change: dict[str, torch.Tensor | None], message: str) -> None:
    given = {"image": torch.zeros(2, 4), "offset": torch.zeros(2, 3), **change}
    with pytest.raises(Invalid, match=message):
        named.request({name: x for name, x in given.items() if x is not None})
