"""What the ranks of a run agree on: hooks, lengths, where to continue, when to stop; what they tell each other of an error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch_frame.distributed.strategy import SingleProcess, Strategy
from torch_frame.errors import CheckpointError, SettingError
from torch_frame.run.meetings import Meetings
from torch_frame.run.resume import Found, read

_logger = logging.getLogger("torch_frame")
T = TypeVar("T")


class Ranks:
    """The ranks of a run, as its loop and its hooks see them.

    Hooks are the same on all ranks, or rank 0 has some and the others none: then the others wait while those of rank 0 work.

    Args:
        strategy: of the run.

    Attributes:
        hooks_on_all: all ranks have the same hooks.
        told_apart: it was told that the ranks train different models.
        wants_stop: this rank wants the run to end.
        on_stop: called when it does: there is something to look at, at the next safe point.
        agree_in_epoch: behind a batch: whether any rank wants something at this safe point (`Meetings.agree`).
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._several = strategy.world_size > 1
        self.hooks_on_all = True
        self.told_apart = False
        self._told_unequal = False
        self.wants_stop = False
        self._stops = False
        self.on_stop: Callable[[], None] = lambda: None
        self._meetings = Meetings(strategy) if self._several else None
        self.agree_in_epoch = strategy.agree if self._meetings is None else self._meetings.agree

    # ---------------------------------------------------------------- hooks

    @property
    def of_hooks(self) -> Strategy:
        """What hooks do together: with all ranks, or alone if only rank 0 has them."""
        return self._strategy if self.hooks_on_all else SingleProcess()

    @property
    def has_hooks(self) -> bool:
        """This rank has the run's hooks."""
        return self.hooks_on_all or self._strategy.rank == 0

    def check_hooks(self, names: Sequence[str]) -> None:
        """Compare the hooks of all ranks.

        Raises:
            SettingError: if they differ, and are not on rank 0 alone.
        """
        if not self._several:
            return
        of_ranks = self._strategy.gather(list(names))
        self.hooks_on_all = all(names == of_ranks[0] for names in of_ranks)
        if not self.hooks_on_all and any(of_ranks[1:]):
            lists = "; ".join(f"rank {rank} [{', '.join(names)}]" for rank, names in enumerate(of_ranks))
            raise SettingError(
                f"The ranks have different hooks: {lists}. Give all of them the same hooks, or hooks to rank 0 and hooks=[] to "
                "the others (None means the default hooks)."
            )

    def alone(self) -> AbstractContextManager[Any]:
        """Around a stage of hooks that may take long: ranks without hooks wait for it without a time-out."""
        if self.hooks_on_all or self._strategy.rank != 0:
            return contextlib.nullcontext()
        return self._strategy.alone()

    def meet(self) -> None:
        """Go on together."""
        if self._several:
            self._strategy.agree(False)

    def begin_batches(self, *, asks: bool) -> None:
        """Before an epoch's batches; `asks`: something in this rank's steps may want something at any safe point."""
        if self._meetings is not None:
            self._meetings.begin_epoch(asks=asks)

    # ---------------------------------------------------------------- the end of the run

    @property
    def stops(self) -> bool:
        """The run is to end: what all ranks know, so that their hooks do the same; hooks that are alone know it at once."""
        return self._stops or (self.wants_stop and not (self._several and self.hooks_on_all))

    @stops.setter
    def stops(self, wanted: bool) -> None:
        """This rank wants the run to end, or not any more."""
        self.wants_stop = bool(wanted)
        self._stops = self._stops and self.wants_stop
        if self.wants_stop:
            self.on_stop()

    def agree_on_stop(self) -> bool:
        """Whether any rank wants the run to end; all know it then."""
        self.wants_stop = self._stops = self._strategy.agree(self.wants_stop)
        return self._stops

    def report(self, error: BaseException) -> None:
        """Tell the others of an error, and the user what another rank has told."""
        if not self._several:
            return
        told = None
        with contextlib.suppress(Exception):
            told = self._strategy.failure()
        if told is not None and told not in str(error):
            error.add_note(f"torch-frame: the first error of the run was on {told}")
        first_line = (str(error).splitlines() or [""])[0]
        self._strategy.tell_failure(f"{type(error).__name__}: {first_line}"[:500])

    # ---------------------------------------------------------------- data and state

    def check_lengths(self, num_batches: int | None) -> None:
        """All ranks have as many batches in an epoch; a rank with fewer would leave the others waiting in their next step.

        Raises:
            SettingError: if they differ.
        """
        if not self._several:
            return
        lengths = self._strategy.gather(num_batches)
        if len(set(lengths)) > 1:
            raise SettingError(
                f"The ranks have different numbers of batches in an epoch: {', '.join(map(str, lengths))} (rank 0, 1, ...). "
                "Each needs the same number; a plain DataLoader of the whole dataset is split so."
            )

    def check_all_save(self, file_name: str) -> None:
        """A whole state is made of what all ranks hold.

        Raises:
            SettingError: if the ranks save different files; for ranks that do something else, an error of the strategy.
        """
        if self._several:
            names = self._strategy.gather(file_name)
            if set(names) != {file_name}:
                raise SettingError(
                    f"The ranks save different whole states at the same time: {', '.join(map(repr, names))}."
                )

    def in_step(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, until one of the ranks has no more: of loaders without a length."""
        return self._in_step(batches) if self._several else batches

    def _in_step(self, batches: Iterator[T]) -> Iterator[T]:
        num = 0
        for batch in batches:
            if self._strategy.agree(False):
                self._tell_of_unequal(num, has_more=True)
                return
            num += 1
            yield batch
        self._strategy.agree(True)
        self._tell_of_unequal(num, has_more=False)

    def _tell_of_unequal(self, num: int, *, has_more: bool) -> None:
        """On all ranks, for the one that has no more may be the one that prints."""
        if self._strategy.agree(has_more) and not self._told_unequal:
            self._told_unequal = True
            _logger.warning(
                "The epoch ends after %d batches on each rank, because one of them has no more. Others have at least one more, "
                "which is not trained on. Give all ranks as many batches.",
                num,
            )

    def share_values(self, state_dict: Callable[[], Any], load_state_dict: Callable[[Any], None]) -> None:
        """Before hooks decide: those of all ranks see rank 0's values, and whether the run ends."""
        if self._several:
            self.agree_on_stop()
        if self._several and self.hooks_on_all:
            values = self._strategy.broadcast(state_dict() if self._strategy.rank == 0 else None)
            if self._strategy.rank != 0:
                load_state_dict(values)

    def find(self, find: Callable[[], Found | None]) -> Found | None:
        """The state that rank 0 finds, on all ranks; read by each, or sent where the file is not there.

        Raises:
            CheckpointError, FileNotFoundError: on all ranks, what rank 0 found wrong.
        """
        if not self._several:
            return find()
        found, error = None, None
        if self._strategy.rank == 0:
            try:
                found = find()
            except Exception as problem:
                error = problem
        place = self._strategy.broadcast(
            (None if found is None else (found.path, found.problems), None if error is None else _told(error))
        )
        if error is not None:
            raise error
        if place[1] is not None:
            kind, message = place[1]
            raise (FileNotFoundError(message) if kind == "FileNotFoundError" else CheckpointError(message))
        return None if place[0] is None else self._read(found, *place[0])

    def _read(self, found: Found | None, path: str, problems: list[str]) -> Found:
        if found is None:
            with contextlib.suppress(OSError, CheckpointError):
                found = Found(path, read(path), problems)
        if self._strategy.agree(found is None):  # the disks of other machines
            state: Any = self._strategy.broadcast(None if found is None else dict(found.state))
            found = found or Found(path, state, problems)
        assert found is not None
        return found


def _told(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)
