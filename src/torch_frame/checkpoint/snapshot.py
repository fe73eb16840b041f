"""A copy of a state in host memory, made fast: training goes on while it is written."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, bool]
_SMALL = 2**14  # bytes; copying these takes no longer than to see whether they have changed
_NUM_SAMPLES = 64  # elements


class _Copy(NamedTuple):
    """Of one tensor."""

    buffer: Tensor
    tensor: Tensor | None
    """The tensor itself, so that no other one takes its memory meanwhile; None: not to be compared."""
    version: int
    """torch's count of writes when it was copied."""


class Snapshot:
    """Copies of tensors that were made together. Its buffers are used again when it is gone.

    Attributes:
        content: the nesting of dicts, lists and tuples, with copies of its tensors; everything else is shared.
    """

    def __init__(self, content: Any, copies: dict[Any, _Copy]) -> None:
        self.content = content
        self._copies = copies
        self._buffers = {id(copy.buffer): copy.buffer for copy in copies.values()}

    @property
    def num_bytes(self) -> int:
        """Of all dense buffers."""
        dense = [buffer for buffer in self._buffers.values() if buffer.layout is torch.strided]
        return sum(buffer.numel() * buffer.element_size() for buffer in dense)

    def forget_tensors(self) -> None:
        """The tensors that were copied are not held any longer: later snapshots copy them again."""
        self._copies = {}


class HostBuffers:
    """Copies the tensors of a state into buffers on the CPU that are used again and again.

    307 MB take about 45 ms in buffers that are there, 180 ms where memory has to be found first. Tensors that are one and the
    same in the state (tied weights) are copied once and stay one. From CUDA the copies go into pinned memory, all at once, with
    one wait at the end.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Form, list[Tensor]] = {}
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @torch.no_grad()
    def copy(self, state: Any, since: Iterable[Snapshot] = ()) -> Snapshot:
        """A snapshot of a nesting of dicts, lists and tuples.

        Args:
            state: what is copied.
            since: earlier snapshots. If none of the tensors that they share with `state` has changed, those are not copied again.
                A change is seen by torch's count of writes, or in 64 elements of each tensor.
        """
        copying = _Copying(self._free_buffers(), _unchanged(state, since))
        content = copying.copied(state)
        _carry_out(copying.plan)
        for form, made in copying.made.items():
            self._buffers.setdefault(form, []).extend(made)
        snapshot = Snapshot(content, copying.copies)
        self._snapshots.add(snapshot)
        return snapshot

    def _free_buffers(self) -> dict[_Form, list[Tensor]]:
        taken = {key for snapshot in self._snapshots for key in snapshot._buffers}
        return {form: [buffer for buffer in all_ if id(buffer) not in taken] for form, all_ in self._buffers.items()}


class _Copying:
    """One snapshot in the making.

    Args:
        free: buffers that are not in use, by form.
        copies: of tensors that need not be copied.

    Attributes:
        copies: the key of a tensor's memory -> its copy.
        plan: pairs (buffer, tensor), still to be copied.
        made: new buffers, by form.
    """

    def __init__(self, free: dict[_Form, list[Tensor]], copies: dict[Any, _Copy]) -> None:
        self.copies: dict[Any, _Copy] = {}
        self.plan: list[tuple[Tensor, Tensor]] = []
        self.made: dict[_Form, list[Tensor]] = {}
        self._free = free
        self._known = copies

    def copied(self, value: Any) -> Any:
        # A method: a nested function that calls itself is a circle, which would hold every tensor until it is collected.
        if isinstance(value, Tensor):
            key = _memory_of(value)
            if key not in self.copies:
                self.copies[key] = self._known[key] if key in self._known else self._placed(value)
            return self.copies[key].buffer
        if isinstance(value, dict):
            made = type(value)()
            for name, item in value.items():
                made[name] = self.copied(item)
            return made
        if type(value) is list or type(value) is tuple:
            return type(value)([self.copied(item) for item in value])
        return value

    def _placed(self, tensor: Tensor) -> _Copy:
        if not _is_plain(tensor) or tensor.is_quantized:
            return _Copy(tensor.detach().to("cpu", copy=True), None, -1)
        tensor = tensor.detach()
        form = tensor.shape, tensor.stride(), tensor.dtype, tensor.is_cuda
        free = self._free.get(form)
        if free:
            buffer = free.pop()
        else:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.made.setdefault(form, []).append(buffer)
        self.plan.append((buffer, tensor))
        return _Copy(buffer, tensor, -1 if tensor.is_inference() else tensor._version)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _memory_of(tensor: Tensor) -> Any:
    if not _is_plain(tensor) or tensor.numel() == 0:
        return id(tensor)
    views = tensor.is_conj(), tensor.is_neg()  # the same memory, read as other values
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, views


# ---------------------------------------------------------------- what has not changed since


def _unchanged(state: Any, since: Iterable[Snapshot]) -> dict[Any, _Copy]:
    """The copies of `since` that can be used for tensors of `state`; none, if one of those has changed."""
    earlier = {key: copy for snapshot in since for key, copy in snapshot._copies.items() if _can_be_compared(copy)}
    if not earlier:
        return {}
    found: dict[Any, Tensor] = {}
    _collect(state, earlier, found)
    by_device: dict[torch.device, list[tuple[Tensor, _Copy]]] = {}
    for key, tensor in found.items():
        by_device.setdefault(tensor.device, []).append((tensor.detach(), earlier[key]))
    same = all(_are_unchanged(pairs) for pairs in by_device.values())
    return {key: earlier[key] for key in found} if same else {}


def _can_be_compared(copy: _Copy) -> bool:
    """Its tensor is large enough, and is a dense piece of memory as its buffer is."""
    tensor, buffer = copy.tensor, copy.buffer
    if tensor is None or copy.version < 0 or tensor.is_conj() or tensor.is_neg():
        return False
    return buffer.nbytes > _SMALL and buffer.stride() == tensor.stride()


def _collect(value: Any, wanted: dict[Any, _Copy], found: dict[Any, Tensor]) -> None:
    """The tensors in a nesting whose memory is one of `wanted`."""
    if isinstance(value, Tensor):
        key = _memory_of(value)
        if key in wanted:
            found[key] = value
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, wanted, found)
    elif type(value) is list or type(value) is tuple:
        for item in value:
            _collect(item, wanted, found)


def _are_unchanged(pairs: list[tuple[Tensor, _Copy]]) -> bool:
    """Of tensors on one device, which is waited for once."""
    if any(tensor.is_inference() or tensor._version != copy.version for tensor, copy in pairs):
        return False
    now, then = _samples([tensor for tensor, _ in pairs]), _samples([copy.buffer for _, copy in pairs])
    return torch.equal(now.cpu(), then)


def _samples(tensors: list[Tensor]) -> Tensor:
    """The bytes of some elements of dense tensors, as they lie in memory."""
    samples = []
    for tensor in tensors:
        step = max(1, tensor.numel() // _NUM_SAMPLES)
        some = tensor.as_strided((min(tensor.numel(), _NUM_SAMPLES),), (step,))
        samples.append(some.contiguous().view(torch.uint8))
    return torch.cat(samples)


def _carry_out(plan: list[tuple[Tensor, Tensor]]) -> None:
    on_cpu = [(buffer, tensor) for buffer, tensor in plan if tensor.device.type == "cpu"]
    if on_cpu:
        torch._foreach_copy_([buffer for buffer, _ in on_cpu], [tensor for _, tensor in on_cpu])
    others = [(buffer, tensor) for buffer, tensor in plan if tensor.device.type != "cpu"]
    for buffer, tensor in others:
        buffer.copy_(tensor, non_blocking=True)
    for device in {tensor.device for _, tensor in others}:
        torch.accelerator.synchronize(device)
