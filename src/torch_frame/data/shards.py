"""An evaluation's batches, dealt out to the ranks: each batch is evaluated on one of them, as one process would evaluate it.

Batches stay whole, so a sample's scores have the bits that they have in one process. Nothing is padded: no sample is there twice.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
)

from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.move import leaves
from torch_frame.data.plan import splits_by_itself
from torch_frame.data.source_base import length_of
from torch_frame.data.workers import iterate, no_second_warning
from torch_frame.distributed.accelerate import is_accelerates_loader
from torch_frame.distributed.launch import num_processes
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError

_logger = logging.getLogger("torch_frame")
Report = tuple[int, int, int]
"""Batches that a rank has evaluated, batches that it knows there are, and a digest of the first one (0: not compared)."""


class First:
    """The first batches of a loader."""

    def __init__(self, loader: Iterable[Any], limit: int) -> None:
        self._loader = loader
        self._limit = limit

    def __len__(self) -> int:
        length = length_of(self._loader)
        if length is None:
            raise TypeError("these batches have no length")
        return min(length, self._limit)

    def __iter__(self) -> Iterator[Any]:
        return islice(iterate(self._loader), self._limit)


class Dealt:
    """The batches of one rank, to be iterated once.

    Args:
        batches: of this rank; or all of them, of which it takes every `world_size`-th.
        num_all: batches of all ranks together; None: counted.
        take: (rank, world_size), if `batches` are all of them.
        compare: the first batch has to be the same on all ranks, for `batches` are all of them.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        num_all: int | None = None,
        *,
        take: tuple[int, int] = (0, 1),
        compare: bool = False,
    ) -> None:
        self._batches = batches
        self._num_all = num_all
        self._rank, self._world_size = take
        self._compare = compare
        self._num_seen = self._digest = 0

    def __len__(self) -> int:
        length = length_of(self._batches)
        if length is None:
            raise TypeError("these batches have no length")
        return len(range(self._rank, length, self._world_size))

    def __iter__(self) -> Iterator[Any]:
        noted = map(self._note, iterate(self._batches))  # no generator: it would stand above a dataset's error
        return islice(noted, self._rank, None, self._world_size)

    def _note(self, batch: Any) -> Any:
        if self._num_seen == 0 and self._compare:
            self._digest = _digest(batch)
        self._num_seen += 1
        return batch

    def report(self) -> Report:
        """What this rank has done."""
        num_own = len(range(self._rank, self._num_seen, self._world_size))
        return num_own, self._num_seen if self._num_all is None else self._num_all, self._digest


def deal(loader: Any, strategy: Strategy, *, own_shards: bool = False, limit: int | None = None) -> Dealt:
    """This rank's part of an evaluation's batches.

    Args:
        loader: that yields the batches of all ranks; of one that accelerate has prepared, or that has a DistributedSampler, all
            samples are taken.
        strategy: of the ranks that evaluate.
        own_shards: the loader yields a part of its own on each rank already.
        limit: only the first so many batches, of each rank's if it has a part of its own already.
    """
    rank, world_size = strategy.rank, strategy.world_size
    if not own_shards:
        loader = whole(loader)
        if world_size == 1 and num_processes() > 1 and _is_of_a_map(loader) and splits_by_itself(loader):
            loader = _of(loader, _index_batches(loader, strategy))  # the hook is on this rank alone: it evaluates all
    if world_size == 1 or own_shards:
        return Dealt(loader if limit is None else First(loader, limit))
    if _is_of_a_map(loader):
        batches = _index_batches(loader, strategy)[:limit]
        own = list(islice(batches, rank, None, world_size))
        return Dealt(_of(loader, own) if own else (), len(batches))
    return Dealt(loader if limit is None else First(loader, limit), take=(rank, world_size), compare=True)


def whole(loader: Any) -> Any:
    """Of a loader that accelerate has prepared for several processes, one that yields all samples, once; any other as it is."""
    if not is_accelerates_loader(loader) or num_processes() == 1 or not hasattr(loader, "base_dataloader"):
        return loader
    part = loader.base_dataloader
    settings = _settings_of(part, part.num_workers)
    if isinstance(part.dataset, IterableDataset):
        dataset: Any = part.dataset
        dataset = dataset.dataset if _is_accelerates(dataset) else dataset
        return DataLoader(dataset, part.batch_size, drop_last=part.drop_last, **settings)
    name = "sampler" if part.batch_sampler is None else "batch_sampler"
    sampler = getattr(part, name)
    sampler = sampler.batch_sampler if _is_accelerates(sampler) else sampler
    settings |= {"batch_size": None} if name == "sampler" else {}
    return DataLoader(part.dataset, **{name: sampler}, **settings)


def _is_accelerates(thing: Any) -> bool:
    """One of accelerate's shards, around the batch sampler or the dataset."""
    return type(thing).__module__.startswith("accelerate.") and hasattr(thing, "process_index")


def check_reports(reports: Sequence[Report], desc: str) -> None:
    """Every batch was evaluated on one rank.

    Raises:
        SettingError: if not: the ranks' loaders differ.
    """
    evaluated, known, digests = zip(*reports, strict=True)
    if len(set(known)) > 1 or sum(evaluated) != known[0] or len(set(digests)) > 1:
        raise SettingError(
            f"The evaluation ({desc}) has to be over the same batches on all ranks, which share them out; the ranks have seen "
            f"{', '.join(map(str, known))} batches{', whose first ones differ' if len(set(digests)) > 1 else ''}. Pass a "
            "DataLoader of the whole map-style dataset; for a loader that gives each rank a part of its own already, pass "
            "own_shards=True to the hook; or give hooks to rank 0 alone."
        )


def _is_of_a_map(loader: Any) -> bool:
    """A DataLoader whose batches are lists of indices, or single indices, that any process can load."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return type(loader).__iter__ is DataLoader.__iter__ or isinstance(loader, InfiniteDataLoader)


def _index_batches(loader: DataLoader[Any], strategy: Strategy) -> list[Any]:
    """The indices of all batches, the same on all ranks."""
    drawn: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if splits_by_itself(loader):
        return _all_parts(loader, drawn, strategy)
    is_plain = type(drawn) is BatchSampler and type(drawn.sampler) is SequentialSampler
    if is_plain or type(drawn) is SequentialSampler:
        return list(drawn)
    batches = [_plain(element) for element in drawn] if strategy.rank == 0 else []
    return strategy.broadcast(batches)  # random orders: rank 0's


def _all_parts(loader: DataLoader[Any], drawn: Any, strategy: Strategy) -> list[Any]:
    """The batches of a sampler that gives each rank a part: each index once, for it pads.

    A sampler of the user's may be over some of the samples only, so the ranks put together what theirs draw. Of a hook that only
    one rank has it is asked as on each of the ranks.
    """
    sampler = drawn.sampler if type(drawn) is BatchSampler else drawn
    if type(sampler) is DistributedSampler:
        all_indices: Any = SequentialSampler(sampler.dataset)  # type: ignore[arg-type]
        return list(all_indices if drawn is sampler else BatchSampler(all_indices, drawn.batch_size, drop_last=False))
    if strategy.world_size > 1:
        parts = strategy.gather([_plain(element) for element in drawn])
    else:
        parts = [[_plain(element) for element in _as_on_rank(rank, drawn)] for rank in range(num_processes())]
        if all(part == parts[0] for part in parts):
            _logger.warning(
                "The evaluation's %s has the part of this rank only, so only this part is evaluated. Pass a DataLoader of the "
                "whole dataset, or give the hook to all ranks.",
                type(sampler).__name__,
            )
    in_turn = [element for elements in zip_longest(*parts) for element in elements if element is not None]
    seen: set[Any] = set()
    batches = [_unseen(element, seen) for element in in_turn]
    return [element for element in batches if element not in ([], None)]


def _as_on_rank(rank: int, sampler: Any) -> Any:
    """A copy of a sampler, or of a batch sampler around one, that believes to be on this rank."""
    as_there = copy.copy(sampler)
    for name, value in vars(sampler).items():
        if name.lstrip("_") == "rank":
            setattr(as_there, name, rank)
        elif isinstance(value, Sampler):
            setattr(as_there, name, _as_on_rank(rank, value))
    return as_there


def _unseen(element: Any, seen: set[Any]) -> Any:
    """A batch without the indices that were seen before, or a single index, None if it was."""
    if isinstance(element, list):
        return [index for index in element if _unseen(index, seen) is not None]
    if element in seen:
        return None
    seen.add(element)
    return element


def _plain(index: Any) -> Any:
    """What a sampler draws, in types that can be sent: lists of indices, which may be numbers, texts or tuples of these."""
    if isinstance(index, Tensor | np.ndarray):
        index = index.tolist()
    if isinstance(index, list):
        return [_plain(one) for one in index]
    if isinstance(index, tuple):
        return tuple(_plain(one) for one in index)
    if isinstance(index, str):
        return str(index)
    return int(index) if isinstance(index, Integral) and not isinstance(index, bool) else index


def _of(loader: DataLoader[Any], batches: list[Any]) -> DataLoader[Any]:
    """A DataLoader like the user's, of these batches."""
    settings = _settings_of(loader, min(loader.num_workers, len(batches)))
    with no_second_warning():
        if loader.batch_sampler is None:
            return DataLoader(loader.dataset, batch_size=None, sampler=batches, **settings)
        return DataLoader(loader.dataset, batch_sampler=batches, **settings)


def _settings_of(loader: DataLoader[Any], num_workers: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": loader.pin_memory,
        "collate_fn": loader.collate_fn,
    }
    if num_workers > 0:
        settings |= {
            "worker_init_fn": loader.worker_init_fn,
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
        }
    return settings


def _digest(batch: Any) -> int:
    """Of a batch's tensors and plain values; other objects count by their class."""
    value = 1
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous().reshape(-1)
            text = f"{tuple(leaf.shape)}{data[:64].tolist()}"
        else:
            text = repr(leaf) if isinstance(leaf, str | bytes | int | float) else type(leaf).__name__
        value = zlib.crc32(text.encode(), value)
    return value
