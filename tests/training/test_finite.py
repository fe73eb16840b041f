"""One room for "is it finite": gradients, values when they are read, weights before they are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torch_frame.errors import NonFiniteError
from torch_frame.training.finite import FiniteCheck, check_weights, first_nonfinite, trained_tensors

NAN, INF = math.nan, math.inf


def gradients(*kinds: torch.dtype) -> list[Tensor]:
    return [torch.linspace(-2, 2, 5 + i).to(kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        (torch.float32,),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.complex64, torch.complex64),
    ],
    ids=str,
)
def test_finite_gradients_pass_with_every_bit_as_it_was(kinds: tuple[torch.dtype, ...]) -> None:
    given, same = gradients(*kinds), gradients(*kinds)
    check = FiniteCheck(given)
    assert check(given)
    assert check(given)
    assert all(torch.equal(a, b) for a, b in zip(given, same, strict=True))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_one_bad_element_is_found_and_forgotten_afterwards(bad: float, kinds: tuple[torch.dtype, ...]) -> None:
    given = gradients(*kinds)
    check = FiniteCheck(given)
    given[1][3] = bad
    assert not check(given)
    assert not check(given)
    given[1][3] = 0.0
    assert check(given)


def test_a_sparse_gradient_is_looked_at_by_its_values() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    assert embedding.weight.grad is not None
    check = FiniteCheck([embedding.weight])
    assert check([embedding.weight.grad])
    assert not check([embedding.weight.grad * INF])


def test_a_torch_without_the_one_pass_check_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
    given = gradients(torch.float32, torch.float32)
    check = FiniteCheck(given)
    assert check(given)
    given[0][0] = NAN
    assert not check(given)


def test_the_first_bad_step_is_named_with_all_that_was_recorded_in_it() -> None:
    columns = {
        "total_loss": ([3, 4, 5], [0.5, NAN, INF]),
        "grad_norm": ([3, 5], [1.0, INF]),
        "l1": ([4, 5], [0.25, 0.75]),
    }
    found = first_nonfinite(columns)
    assert found is not None
    assert (found.name, found.iteration, found.values["l1"], len(found.values)) == ("total_loss", 4, 0.25, 2)


def test_large_values_whose_sum_overflows_are_finite() -> None:
    assert first_nonfinite({"total_loss": ([0, 1], [1.7e308, 1.7e308])}) is None


@pytest.mark.parametrize("columns", [{}, {"total_loss": ([], [])}, {"other": ([1], [NAN])}], ids=str)
def test_nothing_is_found_where_nothing_that_must_be_finite_was_read(
    columns: dict[str, tuple[list[int], list[float]]],
) -> None:
    assert first_nonfinite(columns) is None


class OwnNorm(nn.Module):
    """A normalisation that is none of torch's, with statistics under torch's names."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", torch.ones(2))
        self.register_buffer("mask", torch.full((2,), -INF))


def test_trained_parameters_and_statistics_of_any_norm_have_to_be_finite_and_masks_need_not() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2), "c": OwnNorm()})
    model["a"].bias.requires_grad_(False)
    assert set(trained_tensors(model)) == {
        *("a.weight", "b.weight", "b.bias"),
        *("b.running_mean", "b.running_var", "c.running_mean", "c.running_var"),
    }
    check_weights(trained_tensors(model), "epoch 0")
    model["c"].running_mean[1] = NAN
    with pytest.raises(NonFiniteError, match=r"c\.running_mean .*epoch 0"):
        check_weights(trained_tensors(model), "epoch 0")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_whose_sum_overflows_may_be_written(kind: torch.dtype) -> None:
    check_weights({"weight": torch.full((16,), torch.finfo(kind).max, dtype=kind)}, "epoch 0")
