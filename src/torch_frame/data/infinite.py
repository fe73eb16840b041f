"""InfiniteDataLoader: workers that live for the whole run and know no pause between epochs."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, IterableDataset

from torch_frame.data.plan import plan_of
from torch_frame.data.source_ordered import EndlessSource


class InfiniteDataLoader(DataLoader[Any]):
    """A DataLoader whose workers live for the whole run and fetch the next epoch while this one is trained.

    Each `for` over it is an epoch, in an order of its own: a function of (seed, epoch), the same for every number of workers; so
    is each sample's augmentation, which draws from random numbers seeded with (seed, epoch, position). The dataset's `set_epoch`
    is called in the workers when an epoch begins. Breaking out of an epoch is fine; the next `for` is the next epoch.

    Args:
        dataset: map-style.
        batch_size, shuffle, sampler, ...: as for DataLoader.
        seed: of order and augmentation; None: `torch.initial_seed()`, or in a Trainer the run's.

    >>> loader = InfiniteDataLoader(range(4), batch_size=2, shuffle=True, seed=0)
    >>> len(loader), [sorted(torch.cat(list(loader)).tolist()) for epoch in range(2)]
    (2, [[0, 1, 2, 3], [0, 1, 2, 3]])
    """

    def __init__(
        self, dataset: Any, batch_size: int | None = 1, shuffle: bool | None = None, *args: Any, **settings: Any
    ) -> None:
        seed = settings.pop("seed", None)
        self.seed: int | None = None if seed is None else operator.index(seed)
        if isinstance(dataset, IterableDataset):
            raise TypeError("InfiniteDataLoader takes a map-style dataset; an IterableDataset has no order to compute.")
        settings.setdefault("persistent_workers", settings.get("num_workers", 0) > 0)
        super().__init__(dataset, batch_size, shuffle, *args, **settings)
        self._source: EndlessSource | None = None
        self._next_epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next `for` is this epoch."""
        self._next_epoch = epoch

    def __len__(self) -> int:
        return len(plan_of(self, 0))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator of batches, with torch's loader behind it
        if self._source is None:
            seed = torch.initial_seed() if self.seed is None else self.seed
            # A weak reference: with its last strong one a loader ends its workers, and does not wait for the collector.
            self._source = EndlessSource(weakref.proxy(self), seed)
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        return self._batches(self._source, epoch)

    def _batches(self, source: EndlessSource, epoch: int) -> Iterator[Any]:
        for batch, _ in source.epoch(epoch):
            yield batch

    def close(self) -> None:
        """End the workers; another `for` starts new ones."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
