"""After which batches the ranks ask each other whether one of them wants something: a save, the run's end.

An exchange costs more than a small step (two processes on two cores: 1 ms), so it is made after each batch only if something in
the step may ask: a hook of the user's, a `train_one_iter` of the user's, a save every few batches. All else comes at no
particular batch (a signal, a time that is up, a save that has failed), so it can wait for the next exchange, which is made
`INTERVAL_S` later at the latest, and after `MOST` updates at the latest.
"""

from __future__ import annotations

import time

from torch_frame.distributed.strategy import Strategy

INTERVAL_S = 0.1
MOST = 32
_WANTED = 1e6  # s: what a rank adds to its time if it wants something
_LONGEST_S = 1e3


class Meetings:
    """The safe points inside an epoch at which the ranks of a run meet. All of them count these alike.

    Args:
        strategy: of several ranks.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._at_each = True
        self._every = 1  # safe points from one meeting to the next
        self._left = 1
        self._since = 0.0

    def begin_epoch(self, *, asks: bool) -> None:
        """Before an epoch's batches, on all ranks.

        Args:
            asks: something in this rank's steps may want something at any safe point.
        """
        self._at_each = self._strategy.agree(asks)
        self._left = self._every
        self._since = time.monotonic()

    def agree(self, wants: bool) -> bool:
        """At a safe point behind a batch: whether any rank wants something; False, too, if the ranks do not meet here."""
        if self._at_each:
            return self._strategy.agree(wants)
        self._left -= 1
        return self._left <= 0 and self._meet(wants)

    def _meet(self, wants: bool) -> bool:
        """One exchange for both: whether a rank wants something, and how long the ranks took since the last meeting."""
        now = time.monotonic()
        elapsed, self._since = min(now - self._since, _LONGEST_S), now
        total = self._strategy.sum(elapsed + (_WANTED if wants else 0.0))
        mean = total % _WANTED / self._strategy.world_size
        fitting = int(self._every * INTERVAL_S / max(mean, 1e-9))
        self._every = self._left = max(1, min(fitting, 2 * self._every, MOST))
        return total >= _WANTED
