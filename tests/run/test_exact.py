"""Values of an optimizer's state come back as they were."""

from __future__ import annotations

import torch

from torch_frame.run.exact import castable, exact


def test_values_come_back_as_they_were() -> None:
    half = torch.ones(2, dtype=torch.float16)
    value = {"t": torch.full((2,), 1 / 3, dtype=torch.float64), "s": "text", "l": [half, "x", None], "n": 1, "b": b"x"}
    cast = castable(value)
    assert cast["s"] is cast["l"][1] is cast["b"] is None
    loaded = {"t": value["t"].float(), "s": None, "l": [half.float(), None, None], "n": torch.tensor(1.0), "b": None}  # type: ignore[attr-defined]
    made = exact(value, {**loaded, "new": 3})
    assert torch.equal(made["t"], value["t"])
    assert made["l"][0].dtype == torch.float16
    assert (made["s"], made["l"][1:], made["n"], made["b"], made["new"]) == ("text", ["x", None], loaded["n"], b"x", 3)
