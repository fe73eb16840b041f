"""Parts of the state that may be others on each rank: a loader's own place, its generators, what its samplers hold."""

from __future__ import annotations

import logging
from typing import Any

from torch_frame.checkpoint.digest import fingerprint
from torch_frame.checkpoint.format import plain
from torch_frame.distributed.strategy import Strategy
from torch_frame.run.state import Part

_logger = logging.getLogger("torch_frame")
_KEY = "of_ranks"


class OfRanks:
    """A part that is saved for each rank if the ranks' states differ, once if they do not.

    Saving it is done on all ranks together.

    Args:
        part: of this rank.
        what: it is, for the line that says what cannot be restored.
        strategy: of the run.
        may_differ: False spares the ranks the exchange.
    """

    def __init__(self, part: Part, what: str, strategy: Strategy, *, may_differ: bool = True) -> None:
        self._part = part
        self._what = what
        self._strategy = strategy
        self._may_differ = may_differ

    def state_dict(self) -> Any:
        own = self._part.state_dict()
        if self._strategy.world_size == 1 or not self._may_differ:
            return own
        states = self._strategy.gather(plain(own))
        return own if len({fingerprint(state) for state in states}) == 1 else {_KEY: states}

    def load_state_dict(self, state: Any) -> None:
        if isinstance(state, dict) and _KEY in state:
            states, rank = state[_KEY], self._strategy.rank
            if len(states) != self._strategy.world_size:
                _logger.warning(
                    "The state of the %s is another on each rank. It was saved by %d ranks, and there are %d: those without one "
                    "take rank 0's, so some data may be trained on twice and other data not at all.",
                    self._what,
                    len(states),
                    self._strategy.world_size,
                )
            state = states[rank] if rank < len(states) else states[0]
        self._part.load_state_dict(state)
