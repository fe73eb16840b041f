"""The batches of a run's epochs: from the loader in use, on the device, timed, and not waited for where a signal ends the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from torch_frame.data.move import move_to_device
from torch_frame.data.plan import splits_by_itself
from torch_frame.data.prefetch import has_streams, prefetch_to_device
from torch_frame.data.rng import loader_generator_states
from torch_frame.data.source import SequenceSource, Source, length_of, source_of
from torch_frame.data.source_base import batch_size_of
from torch_frame.distributed.strategy import Strategy
from torch_frame.progress import Progress
from torch_frame.run import checks, parts
from torch_frame.run.of_ranks import OfRanks
from torch_frame.run.samplers import Samplers
from torch_frame.run.state import Part
from torch_frame.signals.stop import StopSignals
from torch_frame.tracking.step_times import StepTimes
from torch_frame.training.optimization import Optimization

_logger = logging.getLogger("torch_frame")


class Feed:
    """The loader in use, and what comes from it.

    Args:
        loader: that the trainer was made with.
        seed: of the data's order.
        strategy: which rank this is.
        device: where the batches go.
        progress: where the run stands.
        take_over, prefetch: as the trainer has them.

    Attributes:
        source: yields a loader's batches, with their positions.
        loader: the one that `source` iterates.
        next_loader: of the epoch that begins next; a script or a hook may set another.
        take_over: as given.
        prefetch: as given; another one may be set, and counts from the next epoch on.
        times: of the step under way; a hook may bring others that split all of the run's time.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        seed: int,
        strategy: Strategy,
        device: torch.device,
        progress: Progress,
        *,
        take_over: bool,
        prefetch: bool,
    ) -> None:
        self._first_loader = self.next_loader = loader
        self._progress = progress
        self._strategy = strategy
        self._device = device
        self.take_over = take_over
        self.prefetch = prefetch
        self._samplers: Samplers | None = None
        self.times = StepTimes()
        self.loader: Iterable[Any] = ()
        self.source: Source = SequenceSource(())
        self.set(loader, seed, 0)

    def set(self, loader: Iterable[Any], seed: int, last_epoch: int | None) -> None:
        """Iterate this loader from now on; `last_epoch` is the index of the run's last one, if that is known."""
        is_there = loader is self.loader and not self.source.is_ours  # it may stand inside an epoch, and needs no seed
        self.loader = loader
        self._seed = seed
        if self._samplers is None or not self._samplers.is_of(loader):
            self._samplers = Samplers(loader)
        if not is_there:
            self.source = source_of(loader, seed, self._strategy, take_over=self.take_over, last_epoch=last_epoch)
        self.source.before_order = self._samplers.epoch_begins

    def use_next(self, last_epoch: int | None) -> None:
        """At an epoch's begin: iterate `next_loader`, which may be another one than before."""
        loader = self.next_loader
        if loader is not self.loader:
            checks.check_loader_kind(loader)
            checks.check_loader(loader, 1, length_of(loader), prefetch=self.prefetch)
            self.source.close()
            self.set(loader, self._seed, last_epoch)

    @property
    def in_use(self) -> Iterable[Any]:
        """The loader of the epoch under way; one that is set meanwhile counts from the next one on."""
        return self.loader if self._progress.is_epoch_begun else self.next_loader

    def epoch_len(self) -> int | None:
        """Batches in an epoch, on this rank; None if the loader has no length."""
        return length_of(self.in_use) if self._strategy.world_size == 1 else self.source.num_batches

    @property
    def batch_size(self) -> int | None:
        """Samples in one of the loader's batches on this rank, as it is now; None if the loader does not say."""
        size: int | None = batch_size_of(self.in_use, self._strategy.world_size)
        return size

    def batches(self, signals: StopSignals, optimization: Optimization) -> Iterator[tuple[Any, int]]:
        """The epoch's batches, on the device, and the position behind each; of a resumed epoch those that are left.

        Args:
            signals: one that comes while a batch is waited for ends the wait, unless
            optimization: has a window of gradients open.
        """
        self._progress.epoch_begun = True
        placed = self.source.epoch(self._progress.epoch, self._progress.position)
        device, times = self._device, self.times
        ahead = self.prefetch and has_streams(device) and self.source.may_fetch_ahead
        if ahead:
            placed = prefetch_to_device(placed, device)
        may_interrupt = self.source.interruptible and self._strategy.world_size == 1
        times.ask()
        try:
            signals.begin_wait(may_interrupt and not optimization.window_open)
            for batch, position in placed:
                if may_interrupt:
                    signals.end_wait()
                moved = batch if ahead else move_to_device(batch, device)
                times.receive()
                yield moved, position
                times.ask()
                if may_interrupt:
                    signals.begin_wait(not optimization.window_open)
        finally:  # after a fetch that failed, too: later waits must not be interrupted
            signals.end_wait()
            times.end_asking()

    def generator_states(self) -> dict[str, Any]:
        """Of the generators that the user gave the loader."""
        return loader_generator_states(self.loader)

    def tell(self) -> None:
        """Say what a person should know of the loader."""
        if self.source.told:
            _logger.warning(self.source.told)

    def count_again(self, progress: Progress, was: Mapping[str, Any], batch_size: int | None) -> list[tuple[int, str]]:
        """In an epoch that is continued with other batches, count those that are trained as if they had been of today's size,
        so that the epoch's last batch is known.

        Args:
            progress: as it was saved.
            was: the environment that it was saved in.
            batch_size: of today's loader.

        Returns:
            (level, line) of what was done.
        """
        was_size, now_size = was.get("world_size", 1), self._strategy.world_size
        if progress.position == 0 or progress.epoch_trained:
            return []
        if (was_size, was.get("batch_size")) == (now_size, batch_size):
            return []
        num_batches = self.source.num_batches
        num_left = self.source.num_left(progress.position, progress.inner_iter * was_size)
        if num_batches is None or num_left is None or num_left + progress.inner_iter == num_batches:
            return []
        trained, progress.inner_iter = progress.inner_iter, max(num_batches - num_left, 0)
        line = (
            f"The epoch is continued with batches of another size: {trained} are trained, {num_left} follow, and inner_iter "
            f"goes on at {progress.inner_iter} of {num_batches}."
        )
        return [(logging.INFO, line)]

    @property
    def length(self) -> tuple[int, str] | None:
        """Of an epoch's data, as (number, of what); None if it is not known, or the loader was set during the run."""
        return self.source.length if self.loader is self._first_loader else None

    def parts(self) -> dict[str, Part]:
        """What is restored before the first batch, where the data stands."""
        assert self._samplers is not None
        data = parts.DataPart(self.source, self._samplers, self.loader, self._first_loader, self._progress)
        generators = parts.LoaderGeneratorsPart(self.loader)
        apart = self._strategy.own_shards or splits_by_itself(self.loader)
        return {
            "data": OfRanks(data, "loader", self._strategy, may_differ=apart),
            "loader_generators": OfRanks(generators, "loader's generators", self._strategy, may_differ=apart),
        }
