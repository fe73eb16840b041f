"""The work that is timed: matrix products, copies, and steps of a network, with data that is on the device already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from torch_frame.bench.models import build

Work = Callable[[], object]


def matmul(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Work:
    """The product of an (M, K) and a (K, N) matrix, into memory that is there: 2 M N K FLOPs.

    Args:
        shape: (M, N, K).
    """
    m, n, k = shape
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def copy(num_bytes: int, device: torch.device) -> Work:
    """A copy within the device's memory: `num_bytes` are read, and as many written."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def training_step(
    name: str, input_size: tuple[int, int, int, int], device: torch.device, *, bf16: bool = False, channels_last: bool = False,
    compiled: bool = False,
) -> Work:  # fmt: skip
    """Forward, cross entropy, backward and SGD with momentum, over one and the same batch.

    Args:
        name: of the network (`torch_frame.bench.models`).
        input_size: (N, 3, H, W).
        bf16: under autocast; otherwise in fp32, by torch's settings for TF32.
    """
    model, images = _model_and_images(name, input_size, device, channels_last)
    labels = torch.randint(0, 1000, input_size[:1], device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    called = torch.compile(model) if compiled else model
    context = _autocast(device, bf16)

    def step() -> None:
        optimizer.zero_grad()
        with context:
            loss = nn.functional.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()

    return step


def forward_pass(
    name: str,
    input_size: tuple[int, int, int, int],
    device: torch.device,
    *,
    bf16: bool = False,
    channels_last: bool = False,
) -> Work:
    """Inference: evaluation mode, no gradients; arguments as for `training_step`."""
    model, images = _model_and_images(name, input_size, device, channels_last)
    model.eval()
    context = _autocast(device, bf16)

    def forward() -> None:
        with torch.no_grad(), context:
            model(images)

    return forward


def _model_and_images(
    name: str, input_size: tuple[int, int, int, int], device: torch.device, channels_last: bool
) -> tuple[nn.Module, torch.Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = build(name).to(device=device)
    images = torch.randn(input_size, device=device)
    if channels_last:
        model = model.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's types
    return model, images.to(memory_format=memory_format)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


@contextlib.contextmanager
def fp32_as(kind: str) -> Iterator[None]:
    """How matrix products and convolutions of fp32 tensors are computed inside on CUDA: "ieee" or "tf32"."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = kind
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
