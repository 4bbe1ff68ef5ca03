"""All that two ranks are asked in this folder, since to start them costs more than their answers."""

from __future__ import annotations

from typing import Any


def everything(rank: int) -> dict[str, Any]:
    import test_pipeline
    import test_tensor

    asked = (
        test_pipeline.few,
        test_pipeline.ways,
        test_pipeline.spoilt,
        test_pipeline.unbiased,
        test_pipeline.exchanged,
        test_pipeline.complaints,
        test_tensor.splits,
        test_tensor.plans,
        test_tensor.int8,
    )
    return {function.__name__: function(rank) for function in asked}
