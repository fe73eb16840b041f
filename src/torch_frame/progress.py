"""How far a run has come: the only counters there are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Counts of what is done; all start at 0, and a checkpoint holds exactly these.

    `in_epoch` and `in_iter` say that an epoch or a batch is under way and not counted yet. They are what turns a count
    ("3 batches done") into the index that hooks see ("batch 2", during it and until the next one begins).
    """

    epoch: int = 0
    """Epochs done, `after_epoch` included."""
    iter: int = 0
    """Batches trained in the whole run."""
    inner_iter: int = 0
    """Batches trained in the epoch under way; if it is continued with batches of another size, as if all were of that size."""
    position: int = 0
    """Where the epoch's data stands behind the last trained batch: in a DataLoader's global order, samples consumed."""
    num_updates: int = 0
    """Optimizer steps taken (with gradient accumulation: complete windows)."""
    epoch_trained: bool = False
    """All batches of the epoch are trained, and its `after_epoch` is what comes next."""
    epoch_begun: bool = False
    """`before_epoch` of the epoch under way has run, and its batches are asked for: a resumed run does not repeat it."""
    in_epoch: bool = False
    in_iter: bool = False
    last_inner_iter: int = 0
    """Index in its epoch of the last batch of this process, for hooks that run between epochs."""

    @property
    def is_inside_epoch(self) -> bool:
        """Batches of the epoch under way are trained."""
        return self.position > 0

    @property
    def is_epoch_begun(self) -> bool:
        """`before_epoch` of the epoch under way has run."""
        return self.epoch_begun or self.is_inside_epoch

    def begin_epoch(self) -> None:
        self.in_epoch = True

    def end_iter(self, position: int) -> None:
        """A batch is trained: from now on a saved state counts it; `after_iter` still sees its index."""
        self.iter += 1
        self.inner_iter += 1
        self.position = position
        self.in_iter = False

    def end_batches(self) -> None:
        """The epoch's last batch is trained; `after_epoch` is next."""
        self.epoch_trained = True

    def end_epoch(self) -> bool:
        """The hooks of `after_epoch` have run.

        Returns:
            Whether the epoch is counted; False if the run ended inside it: it goes on there if it is continued.
        """
        if not self.epoch_trained:
            return False
        self.epoch += 1
        self.last_inner_iter = max(self.inner_iter - 1, 0)
        self.inner_iter = 0
        self.position = 0
        self.epoch_trained = self.epoch_begun = False
        self.in_epoch = False
        return True

    @property
    def current_epoch(self) -> int:
        """Index of the epoch under way, a resumed one before its first batch too, or between epochs of the last one."""
        return self.epoch if self.in_epoch or self.is_inside_epoch else max(self.epoch - 1, 0)

    @property
    def current_iter(self) -> int:
        """Index in the run of the batch under way, or between batches of the last one."""
        return self.iter if self.in_iter else max(self.iter - 1, 0)

    @property
    def current_inner_iter(self) -> int:
        """Index in the epoch of the batch under way, or between batches of the last one."""
        if self.in_iter:
            return self.inner_iter
        return self.inner_iter - 1 if self.inner_iter else self.last_inner_iter

    def state_dict(self) -> dict[str, int | bool]:
        return {
            "epoch": self.epoch,
            "iter": self.iter,
            "inner_iter": self.inner_iter,
            "position": self.position,
            "num_updates": self.num_updates,
            "epoch_trained": self.epoch_trained,
            **({"epoch_begun": True} if self.epoch_begun and self.position == 0 else {}),
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        self.epoch = int(state["epoch"])
        self.iter = int(state["iter"])
        self.inner_iter = int(state["inner_iter"])
        self.position = int(state["position"])
        self.num_updates = int(state["num_updates"])
        self.epoch_trained = bool(state["epoch_trained"])
        self.epoch_begun = bool(state.get("epoch_begun", False))
        self.in_epoch = self.in_iter = False
        self.last_inner_iter = 0
