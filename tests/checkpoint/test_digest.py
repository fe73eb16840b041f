"""A digest changes with what it is of."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch

from torch_frame.checkpoint.digest import fingerprint, tensor_digest


class Stage(enum.Enum):
    HOT = 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.float64]
)
@pytest.mark.parametrize("size", [0, 1, 7, 5000])
def test_a_digest_sees_each_element_and_its_place(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 2, (size,), generator=generator).to(dtype)
    digest = tensor_digest([tensor])
    assert tensor_digest([tensor.clone()]) == digest
    for place in range(0, size, 701):
        other = tensor.clone()
        other[place] = not tensor[place]
        assert tensor_digest([other]) != digest
    if size > 1:
        rolled = tensor.roll(1)
        assert tensor_digest([rolled]) != digest or torch.equal(rolled, tensor)


def test_a_fingerprint_tells_what_has_changed() -> None:
    values = [
        1,
        1.0,
        "1",
        None,
        [1],
        [1, 2],
        {"a": 1},
        {"a": torch.zeros(2)},
        {"a": torch.ones(2)},
        {1},
        b"1",
        (1,),
        Stage.HOT,
    ]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({"a": [np.ones(2)]}) == fingerprint({"a": [np.ones(2)]})


def test_a_digest_sees_numbers_that_differ_in_few_bits() -> None:
    values = [torch.full((size,), float(n), dtype=torch.float64) for n in range(-4, 5) for size in (2, 4, 1024, 2048)]
    assert len(set(tensor_digest(values))) == len(values)


def test_a_digest_does_not_depend_on_how_the_tensor_lies_in_memory() -> None:
    tensor = torch.randn(300, 1001, generator=torch.Generator().manual_seed(0))
    expected = tensor_digest([tensor])
    assert tensor_digest([tensor.t().contiguous().t()]) == expected
    assert tensor_digest([torch.cat([torch.zeros(1), tensor.reshape(-1)])[1:].view(300, 1001)]) == expected
