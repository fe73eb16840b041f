"""Whether the ranks of a run hold the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_frame.distributed.strategy import Strategy


@torch.no_grad()
def are_same_on_all_ranks(strategy: Strategy, model: nn.Module) -> bool:
    """By their sums in float64: ranks that get the same gradients have the same bits. All ranks call it."""
    sums = [one.sum(dtype=torch.float64) for one in map(as_numbers, model.parameters()) if one is not None]
    numbers = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []  # one wait for the device
    of_ranks = strategy.gather([repr(number) for number in numbers])  # NaN is like NaN
    return all(one == of_ranks[0] for one in of_ranks)


def as_numbers(tensor: Tensor) -> Tensor | None:
    """The same memory as numbers that can be added and sent; None of lazy, sparse and quantized tensors, and other classes."""
    if is_lazy(tensor):
        return None
    bare = tensor.detach()
    if type(bare) is not Tensor or bare.layout is not torch.strided or bare.is_quantized:
        return None
    if bare.is_complex():
        return torch.view_as_real(bare)
    is_short = bare.is_floating_point() and bare.element_size() == 1  # float8
    return bare.view(torch.uint8) if is_short else bare
