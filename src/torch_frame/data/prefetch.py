"""Batches on their device, copied there while the batch before trains where the device has streams (CUDA, XPU)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_frame.data.move import leaves, move_to_device

T = TypeVar("T")
_WITHOUT_STREAMS = ("cpu", "meta", "mps")


def prefetch_to_device(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """Yields every batch with its tensors on `device`; see `move_to_device` for what a batch may be.

    On a device with streams (`has_streams`: CUDA, XPU) the next batch is fetched, and its copy started on a stream of its
    own, before a batch is yielded; from pinned memory that copy is asynchronous. What goes wrong with a batch is raised when
    that batch is asked for, so the ones before it are all trained. Elsewhere nothing is fetched ahead.

    The iterator of `batches` is released when the last batch is asked for, or with the iterator returned here (`break`).

    Args:
        batches: a data loader, or any iterable of batches.
        device: from `resolve_device`.

    >>> [batch.device.type for batch in prefetch_to_device([torch.zeros(2)], torch.device("cpu"))]
    ['cpu']
    """
    if not has_streams(device):
        return (move_to_device(batch, device) for batch in batches)
    return _on_side_stream(batches, device)


def has_streams(device: torch.device) -> bool:
    """Copies to the device can run beside its work: torch has streams for it, and memory that can wait for them.

    CUDA (ROCm too) and XPU have them, MPS and the CPU do not; any other kind of device is asked, once.

    >>> has_streams(torch.device("cpu"))
    False
    """
    return device.type == "cuda" or (device.type not in _WITHOUT_STREAMS and _gives_streams(device.type))


@cache
def _gives_streams(kind: str) -> bool:
    """A kind of device that is not known here has all that `_SideStream` uses."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != kind:
        return False
    try:
        with torch.Stream(kind):
            torch.empty(0, device=kind).record_stream(torch.accelerator.current_stream())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def _on_side_stream(batches: Iterable[T], device: torch.device) -> Generator[T, None, None]:
    side = _SideStream(device)  # made at the first batch: a generator that is never asked starts no CUDA
    yield from _one_ahead(batches, side.copy, side.hand_over)


def _one_ahead(
    batches: Iterable[T], copy: Callable[[T], T], hand_over: Callable[[T], None]
) -> Generator[T, None, None]:
    """Yields `copy(batch)` for each batch, with the next one's fetch and copy begun before.

    The order is copy(0), hand_over(0), copy(1), yield 0, hand_over(1), copy(2), yield 1, ...: a batch is handed over
    before the next copy begins, or it would wait for that copy as well.
    """
    copies = map(copy, batches)
    ready = list(islice(copies, 1))  # one batch, or none at the end
    while ready:
        hand_over(ready[0])
        error: Exception | None = None  # a KeyboardInterrupt does not wait
        try:
            ahead = list(islice(copies, 1))
        except Exception as raised:
            ahead, error = [], raised
        yield ready.pop()  # popped: nothing here holds a batch that is being trained
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame, and this frame would hold it
        ready = ahead


class _SideStream:
    """Copies batches on a stream of its own, and hands them to the stream that trains.

    A tensor made on the side stream may be freed by the host while the training stream still reads it; `record_stream`
    keeps the allocator from giving its memory to the next copy. Where a batch has parts that can't be recorded (objects
    with their own `.to`, tensor subclasses, sparse tensors) or that the training stream may still be writing (data made
    on the device), each copy from then on waits for the work that the training stream has been given so far. That is the
    step before the one that the copy overlaps, so only copies from unpinned memory get slower by it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)
        self.waits_for_training = False

    def copy(self, batch: Any) -> Any:
        """Starts the copy of one batch."""
        if not self.waits_for_training:
            self.waits_for_training = not all(map(_is_plain_host_data, leaves(batch)))
        if self.waits_for_training:
            self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            return move_to_device(batch, self.device)

    def hand_over(self, batch: Any) -> None:
        """Makes the current stream wait for the copies begun so far, and its memory wait for the current stream."""
        current = torch.accelerator.current_stream(self.device)
        current.wait_stream(self.stream)
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type and leaf.layout is torch.strided:
                leaf.record_stream(current)


def _is_plain_host_data(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return type(leaf) is Tensor and leaf.layout is torch.strided and leaf.device.type == "cpu"
    return isinstance(leaf, type) or not callable(getattr(leaf, "to", None))
