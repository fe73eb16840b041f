"""What the trainer iterates: the protocol, and what sources have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

BatchAndPosition = tuple[Any, int]
"""A batch, and the position where a run continues that has consumed it."""


class Source(Protocol):
    """What the trainer iterates.

    Attributes:
        is_ours: order and augmentation of a user's loader are replaced by ours.
        interruptible: a wait for a batch may be interrupted; what was fetched is fetched again.
        may_fetch_ahead: a batch may be fetched before the one before it is trained.
        seed: of the order, if it is ours.
        before_order: called with the epoch before its first index is drawn.
    """

    is_ours: bool
    interruptible: bool
    may_fetch_ahead: bool
    seed: int
    before_order: Callable[[int], None]

    @property
    def length(self) -> tuple[int, str] | None:
        """Of an epoch, as (number, of what), or None if it is not known."""
        ...

    @property
    def length_varies(self) -> bool:
        """The length may be another one in each epoch."""
        ...

    @property
    def num_batches(self) -> int | None:
        """Batches in an epoch, on this rank; None if it is not known."""
        ...

    def num_left(self, position: int, num_dealt: int) -> int | None:
        """Batches from a position on, on this rank; None if it is not known.

        Args:
            position: of which the epoch is continued.
            num_dealt: of the loader's batches, that were given to the ranks before it.
        """
        ...

    @property
    def told(self) -> str | None:
        """What happens to an epoch's last samples that are fewer than the ranks, or None."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchAndPosition]:
        """The epoch's batches from position `start` on; a position of 0 is the epoch's beginning."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...

    def state_dict(self, position: int) -> dict[str, Any]:
        """What is saved beside the position, as it was behind the batch that ends there; a later one may have been fetched."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        """Take on a state that was saved at position `start`; the training's random numbers are restored afterwards."""
        ...


class StatelessSource:
    """A source that has nothing to save beside the position.

    Args:
        loader: what is iterated.
    """

    is_ours = False
    interruptible = True
    may_fetch_ahead = True
    seed = 0

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.before_order: Callable[[int], None] = _nothing

    @property
    def num_batches(self) -> int | None:
        return length_of(self._loader)

    @property
    def length(self) -> tuple[int, str] | None:
        return None if self.num_batches is None else (self.num_batches, "batches")

    @property
    def length_varies(self) -> bool:
        return False

    def num_left(self, position: int, num_dealt: int) -> int | None:
        return None

    @property
    def told(self) -> str | None:
        return None

    def close(self) -> None:
        """Nothing runs in the background between epochs."""

    def state_dict(self, position: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], start: int) -> None:
        """Nothing to take on."""


def _nothing(epoch: int) -> None:
    """Nobody wants to know."""


def length_of(loader: Any) -> int | None:
    """len(loader), or None if it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def batch_size_of(loader: Any, num_ranks: int) -> Any:
    """Samples in one batch of each rank, as the loader says; None if it does not.

    A loader that accelerate has prepared may deal the samples of each of its batches out (`split_batches`).
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    size = getattr(batch_sampler, "batch_size", getattr(loader, "batch_size", None))
    is_accelerates = type(loader).__module__.partition(".")[0] == "accelerate"
    is_split = is_accelerates and (
        getattr(loader, "split_batches", False) or getattr(batch_sampler, "split_batches", False)
    )
    return size // num_ranks if is_split and isinstance(size, int) else size
