"""RepeatDataset: a small dataset several times in an epoch."""

from __future__ import annotations

from typing import Any

from torch_frame.errors import SettingError
from torch_frame.scalars import is_whole


class RepeatDataset:
    """A dataset `times` times in a row: fewer epoch borders for small data.

    Args:
        dataset: map-style, with a length.
        times: how often.

    >>> [RepeatDataset("ab", 2)[i] for i in range(4)]
    ['a', 'b', 'a', 'b']
    """

    def __init__(self, dataset: Any, times: int) -> None:
        if not is_whole(times) or times < 0:
            raise SettingError(f"times is {times!r}; it has to be a whole number, not below 0.")
        self.dataset = dataset
        self.times = int(times)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} is outside of a RepeatDataset of {len(self)} samples.")
        return self.dataset[index % len(self.dataset)]

    def __len__(self) -> int:
        return self.times * len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Tell the dataset, where it wants to know."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
