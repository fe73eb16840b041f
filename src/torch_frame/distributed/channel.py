"""Small exchanges between the ranks beside the gradients: flags, numbers and states.

They go over a gloo group of their own, on the CPU, so they wait for no GPU and mix with nothing that a script does on its
groups. Each exchange says what it is: ranks that do different things are told at once, instead of waiting for each other. A rank
that waits looks once a second whether another one has failed, so it ends then and not at the group's time-out; and while rank 0
has said that it works alone (an evaluation that only it has), no time-out counts.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import io
import math
import struct
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOK_S = 1.0
"""A rank that waits looks so often whether the others are well."""
DEFAULT_TIMEOUT_S = 1800.0
_GLOO_TIMEOUT = datetime.timedelta(days=30)  # waits are ended by us: see `_wait`
_WORKS = ("agree", "sum", "gather", "collect", "broadcast")

_num_channels = 0


class RanksError(RuntimeError):
    """Another rank has failed, is not there, or does something else than this one."""


class Channel:
    """The exchanges of one training. All ranks make it, and call the same methods in the same order.

    Args:
        timeout_s: how long a rank waits for the others; None: as long as the process group does.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # some builds of torch have none

        global _num_channels
        _num_channels += 1
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.timeout_s = _timeout_of_group() if timeout_s is None else timeout_s
        self._store = PrefixStore(f"torch_frame/{_num_channels}", _get_default_store())
        self._group: Any = dist.new_group(backend="gloo", timeout=_GLOO_TIMEOUT)
        self._sent = torch.empty(2, dtype=torch.int64)
        self._received = [torch.empty(2, dtype=torch.int64) for _ in range(self.world_size)]
        self._exchanged: Any = None  # tensors of the exchange under way
        self._is_kept = False
        self._num_alone = 0  # `alone` inside each other
        atexit.register(_close, weakref.ref(self))

    # ---------------------------------------------------------------- exchanges

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self._exchange("agree", int(flag)))

    def sum(self, value: float) -> float:
        """The sum over the ranks, rounded once: the same bits on all of them."""
        values = self._exchange("sum", struct.unpack("q", struct.pack("d", value))[0])
        numbers = [struct.unpack("d", struct.pack("q", bits))[0] for bits in values]
        return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)

    def gather(self, value: Any) -> list[Any]:
        """The ranks' values on all ranks."""
        own = _packed(value)
        sizes = self._exchange("gather", len(own))
        padded, parts = _padded(own, sizes), [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
        self._exchanged = (parts, padded)
        self._wait(dist.all_gather(parts, padded, group=self._group, async_op=True), "gather")
        return [_unpacked(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def collect(self, value: Any) -> list[Any]:
        """The ranks' values on rank 0; [] on the others."""
        own = _packed(value)
        sizes = self._exchange("collect", len(own))
        parts = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes] if self.rank == 0 else None
        padded = _padded(own, sizes)
        self._exchanged = (parts, padded)
        self._wait(dist.gather(padded, parts, group=self._group, async_op=True), "collect")
        return [_unpacked(part[:size]) for part, size in zip(parts or [], sizes, strict=self.rank == 0)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on all ranks."""
        own = _packed(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = self._exchange("broadcast", len(own))[0]
        data = own if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
        self._exchanged = data
        self._wait(dist.broadcast(data, src=0, group=self._group, async_op=True), "broadcast")
        return _unpacked(data)

    def _exchange(self, work: str, number: int) -> list[int]:
        """Every rank's number.

        Raises:
            RanksError: where ranks do different things, or one of them does not come.
        """
        own, sent = _WORKS.index(work), self._sent
        sent[0], sent[1] = own, number
        self._wait(dist.all_gather(self._received, sent, group=self._group, async_op=True), work)
        pairs = [pair.tolist() for pair in self._received]
        if any(code != own for code, _ in pairs):
            raise RanksError(
                "The ranks do different things at the same time: "
                + ", ".join(f"rank {rank} does {_WORKS[code]!r}" for rank, (code, _) in enumerate(pairs))
                + ". Saving a whole state, evaluating and loading are done on all ranks together; look for code under "
                "'if rank == 0' that calls the trainer."
            )
        return [number for _, number in pairs]

    def _wait(self, work: Any, what: str) -> None:
        try:
            self._wait_and_look(work, what)
            self._exchanged = None
        except BaseException:  # a Ctrl-C, too
            if not work.is_completed():
                self._is_kept = True
                _keep_for_ever(self)
            raise

    def _wait_and_look(self, work: Any, what: str) -> None:
        since = time.monotonic()
        while True:
            try:
                work.wait(datetime.timedelta(seconds=LOOK_S))
                return
            except RuntimeError as error:
                if work.is_completed():  # it has failed, or it was ready in this moment
                    self._end(work, error)
                    return
            since = self._look_at_the_others(what, since)

    def _end(self, work: Any, error: RuntimeError) -> None:
        try:
            work.wait(datetime.timedelta(seconds=LOOK_S))
        except RuntimeError:
            raise RanksError(
                f"Another rank has ended: {self.failure() or 'it did not say why; look at its output'}."
            ) from error

    def _look_at_the_others(self, what: str, since: float) -> float:
        """Raise if waiting is in vain; returns since when the time-out counts."""
        failure = self.failure()
        if failure is not None:
            raise RanksError(f"Another rank has failed: {failure}.")
        if self._read("alone") == "1":
            return time.monotonic()
        if time.monotonic() - since > self.timeout_s:
            raise RanksError(
                f"Rank {self.rank} has waited {self.timeout_s:.0f} s for the other ranks to {what!r}. One of them is stuck, or "
                "does something for longer; the time is the timeout of init_process_group, or DDP(timeout_s=...)."
            )
        return since

    def close(self) -> None:
        """End the group and its threads, at the process's end.

        A thread that is about to free the last exchange's tensors needs Python for that, and aborts the process if Python is
        gone by then: "terminate called without an active exception".
        """
        if not self._is_kept and self._group is not None:
            group, self._group = self._group, None
            with contextlib.suppress(Exception):  # the script has destroyed all groups
                dist.destroy_process_group(group)

    # ---------------------------------------------------------------- what is told to ranks that wait

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """On rank 0: the others wait, however long what is inside takes."""
        self._num_alone += 1
        if self._num_alone == 1:
            self._store.set("alone", "1")
        try:
            yield
        finally:
            self._num_alone -= 1
            if self._num_alone == 0:
                self._store.set("alone", "0")

    def tell_failure(self, what: str) -> None:
        """Tell the others that this rank ends, and why."""
        with contextlib.suppress(Exception):  # rank 0, which keeps the store, may be gone
            if not self._store.check(["failure"]):
                self._store.set("failure", f"rank {self.rank}: {what}")

    def failure(self) -> str | None:
        """What the first rank that failed has told, or None."""
        return self._read("failure")

    def _read(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except Exception as error:
            raise RanksError("Rank 0 has ended: its store does not answer.") from error


def _close(reference: weakref.ref[Channel]) -> None:
    channel = reference()
    if channel is not None:
        channel.close()


def _keep_for_ever(channel: Channel) -> None:
    """Let a group that still waits for a rank never be freed: freeing it waits as long, so this process would not end.

    Nor what it exchanges: its thread would need Python to free that, which may be gone by then.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(channel))


def _timeout_of_group() -> float:
    with contextlib.suppress(Exception):  # torch has no public way to ask
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        return float(backend.options._timeout.total_seconds())
    return DEFAULT_TIMEOUT_S


def _packed(value: Any) -> Tensor:
    data = io.BytesIO()
    torch.save(on_cpu(value), data)
    return torch.frombuffer(data.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def _padded(data: Tensor, sizes: list[int]) -> Tensor:
    return torch.nn.functional.pad(data, (0, max(sizes) - len(data)))


def on_cpu(value: Any) -> Any:
    """Plain containers with their tensors on the CPU: another rank's device is not this one's."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) is dict:
        return {key: on_cpu(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_cpu(item) for item in value)
    return value
