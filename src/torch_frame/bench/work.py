"""The work that is timed: matrix products, copies, and steps of a network, with data that is on the device already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from torch_frame.bench.models import Residual, build

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
        compiled: block by block (`compile_blocks`).
    """
    model, images = _model_and_images(name, input_size, device, channels_last)
    labels = torch.randint(0, 1000, input_size[:1], device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if compiled:
        compile_blocks(model)
    context = _autocast(device, bf16)

    def step() -> None:
        optimizer.zero_grad()
        with context:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def compile_blocks(model: nn.Module, backend: Any = "inductor") -> None:
    """Compile each residual block by itself; blocks of the same shapes share their code.

    ResNet-50 has 8 kinds of blocks, of 33 to 42 operations each; compiled as a whole it is one graph of 550, which takes longer
    than a bench may. Stem and head, 5 operations, stay as they are. torch's documentation calls it regional compilation.
    """
    torch._dynamo.config.recompile_limit = 64  # the kinds share one `forward`, and 8 is the limit as torch sets it
    for module in model.modules():
        if isinstance(module, Residual):
            module.compile(dynamic=False, backend=backend)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is an allocator that failed: torch has a class for it on some devices, and on the others (CPU, MPS) a text."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


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
