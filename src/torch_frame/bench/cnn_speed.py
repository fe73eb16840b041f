"""gpu_cnn_speed: how fast a known network runs and trains here."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torch_frame.errors import SettingError

SECONDS = 2.0
"""For inference, and for training."""
AT_MOST_S = 20.0
"""With the warm-up, on a slow or busy machine: fewer calls then, but one warms up and one is timed in any case."""


def gpu_cnn_speed(
    model_type: str | None = None, input_size: Sequence[int] = (16, 3, 224, 224), gpu_id: int | None = None
) -> dict[str, Any]:
    """Times a network's inference and its training step on the accelerator, prints what was found, and returns it.

    It takes about 5 s on an accelerator; on a slow or busy CPU up to 40 s, or 4 calls if they last longer. The images are on the
    device already; warm-up calls come first, and the device's own events tell the time. Everything is in
    fp32 as torch is set (convolutions may use TF32 inside). 1.7 timed something else under this name: docs/gpu.md.

    Args:
        model_type: "vgg16", "resnet18", "resnet50", "resnet101", "resnet152" or "mobilenet_v2"; None: "resnet50".
        input_size: (N, 3, H, W) of the batch.
        gpu_id: index of the accelerator; None: the current one. Without an accelerator the CPU is timed, which is said.

    Returns:
        "model", "device", "card", "input_size", "parameters", and for "inference" and "training" each: "images_s" (median, and
        the 10th and 90th percentile), "ms" (median of a batch), "tflop" (of a batch) and "tflops" (1e12 FLOPs a second).

    Raises:
        SettingError: for an unknown network, a size that is not (N, 3, H, W) or too small for it, or a card that is not there.
    """
    # Not at import: training needs none of them.
    from torch_frame.bench.device import device_to_measure, name_of
    from torch_frame.bench.flops import forward_flops
    from torch_frame.bench.models import build
    from torch_frame.bench.work import forward_pass, training_step

    name = "resnet50" if model_type is None else model_type
    size = _checked_size(input_size)
    device = device_to_measure(gpu_id)
    with torch.device("meta"):
        model = build(name)
    for_training = _training_flops(model, name, size)
    found: dict[str, Any] = {
        "model": name,
        "device": str(device),
        "card": name_of(device),
        "input_size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inference": _timed(forward_pass(name, size, device), size[0], forward_flops(model, size), device),
        "training": _timed(training_step(name, size, device), size[0], for_training, device),
    }
    for line in _lines(found):
        print(line)
    return found


def _checked_size(input_size: Sequence[int]) -> tuple[int, int, int, int]:
    try:
        images, channels, height, width = map(operator.index, input_size)  # numpy's integers too
    except (TypeError, ValueError):
        images, channels, height, width = 0, 0, 0, 0
    if channels != 3 or min(images, height, width) < 1:
        raise SettingError(
            f"input_size is {input_size!r}; it has to be (images, 3, height, width), such as (16, 3, 224, 224)."
        )
    return images, channels, height, width


def _training_flops(model: nn.Module, name: str, size: tuple[int, int, int, int]) -> int:
    """Nothing is computed, but what cannot be computed is an error here already."""
    from torch_frame.bench.flops import training_flops

    try:
        return training_flops(model, size)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(f"input_size is {size}; {name} cannot be trained on it: {reason}") from None


def _timed(work: Any, num_images: int, flops: int, device: torch.device) -> dict[str, Any]:
    from torch_frame.bench.suite import rate
    from torch_frame.bench.timing import clock_of, time_calls

    # a CPU needs seconds for a batch
    few: dict[str, Any] = {"warm_up": 1, "min_calls": 2} if device.type == "cpu" else {}
    timing = time_calls(work, clock_of(device), SECONDS, at_most_s=AT_MOST_S, **few)
    return {
        "images_s": rate(timing, num_images),
        "ms": round(timing.median * 1e3, 3),
        "tflop": round(flops / 1e12, 9),
        "tflops": round(flops / 1e12 / timing.median, 6),
    }


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    from torch_frame.bench.cards import SECONDS_OF_300_PASSES, TORCH_FRAME_1_7

    yield f"{found['model']}, a batch of {'x'.join(map(str, found['input_size']))}, fp32, on {found['card']}"
    if found["device"] == "cpu":
        yield "torch sees no accelerator here, so the CPU was timed."
    for part in ("inference", "training"):
        figures, rates = found[part], found[part]["images_s"]
        yield (
            f"{part:<9}  {rates['median']:9.1f} images/s (p10 {rates['p10']:.1f}, p90 {rates['p90']:.1f})  "
            f"{figures['ms']:9.2f} ms a batch  {figures['tflops']:7.3f} TFLOP/s"
        )
    seconds = SECONDS_OF_300_PASSES.get(found["input_size"], {}).get(found["model"])
    if seconds:
        cards = ", ".join(f"{card} {value} s" for card, value in seconds.items())
        yield f"1.7 gave for 300 passes, timed in another way and not to be compared: {cards} ({TORCH_FRAME_1_7})."
