"""How many floating-point operations a pass takes, by torch's own counter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions in a call, backward passes included; a multiply-add counts as two.

    Counted by `torch.utils.flop_counter.FlopCounterMode`, which leaves additions, norms and activations out. Recurrent layers
    (LSTM, GRU), compiled code and kernels of one's own are not seen either: it gives less than there is, or 0. Attention counts
    in full if it is causal too, and its fused backward with the product that it makes a second time: 7 products where PaLM's MFU
    has 6.

    >>> a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    >>> count_flops(lambda: a @ b)
    48
    """
    from torch.utils.flop_counter import FlopCounterMode  # not at import: training does not need it

    with _attention_in_parts(), FlopCounterMode(display=False, custom_mapping=_attention_on_cpu()) as counter:
        work()
    return int(counter.get_total_flops())


@contextlib.contextmanager
def _attention_in_parts() -> Iterator[None]:
    """torch's attention and encoder layers without gradients are one kernel for all, which counts as nothing."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def _attention_on_cpu() -> dict[Any, Any]:
    """The CPU's kernels for attention, which torch 2.11 to 2.13 count as nothing: pytorch/pytorch#195460."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def forward_flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """FLOPs of a forward pass over a batch.

    Args:
        model: called as `model(images)`; it is moved to the meta device, where nothing is computed, so build one for this.
        input_size: (N, 3, H, W).
    """
    model, images = _on_meta(model, input_size)
    with torch.no_grad():
        return count_flops(lambda: model(images))


def training_flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """FLOPs of a forward and a backward pass over a batch; arguments as for `forward_flops`.

    About three times the forward pass: backward makes a gradient of the weights and one of the inputs, the first layer only the
    first of them.
    """
    model, images = _on_meta(model, input_size)

    def step() -> None:
        loss: Tensor = model(images).sum()
        loss.backward()

    return count_flops(step)


def _on_meta(model: nn.Module, input_size: Sequence[int]) -> tuple[nn.Module, Tensor]:
    return model.to("meta"), torch.empty(tuple(input_size), device="meta")
