"""What the user's samplers hold, as it was when the epoch began: from there a resumed run draws the epoch's indices again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, Sampler, SequentialSampler

from torch_frame.checkpoint.digest import fingerprint
from torch_frame.checkpoint.format import plain
from torch_frame.checkpoint.slots import attributes_of
from torch_frame.checkpoint.values import decode, encode, like
from torch_frame.data.rng import loader_generators
from torch_frame.errors import CheckpointError
from torch_frame.progress import Progress

_logger = logging.getLogger("torch_frame")
_WITHOUT_STATE = (SequentialSampler, RandomSampler, BatchSampler)
"""torch's own; a subclass of them is a user's."""
_MOST = 256  # samplers in a list


class Samplers:
    """The samplers and batch samplers of a loader.

    A sampler with `state_dict` and `load_state_dict` is saved by these; of others the attributes are saved that have changed
    since the loader was given to the trainer: numbers, texts, tensors, arrays and what else can be saved, without generators,
    which have a place of their own.

    Args:
        loader: as the script has made it.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = weakref.ref(loader) if _may_be_referred_to(loader) else lambda: loader
        self._first = {place: self._fingerprints(sampler) for place, sampler in _samplers_of(loader)}
        self._at_begin: dict[int, dict[str, Any]] = {}

    def is_of(self, loader: Any) -> bool:
        return self._loader() is loader

    def epoch_begins(self, epoch: int) -> None:
        """Called before the first index of an epoch is drawn, which may be while the epoch before it is trained."""
        if self._first:
            now = plain(self._now(), copy_tensors=True)  # a sampler may change them in place
            self._at_begin = dict([*self._at_begin.items(), (epoch, now)][-3:])

    def _now(self) -> dict[str, Any]:
        states = {}
        for place, sampler in _samplers_of(self._loader()):
            if _has_own_state(sampler):
                states[place] = {"state": encode(sampler.state_dict(), f"the state of the loader's {place}")}
            else:
                states[place] = {"attributes": self._changed(sampler, self._first.get(place, {}))}
        return {place: state for place, state in states.items() if state != {"attributes": {}}}

    def state_dict(self, progress: Progress) -> dict[str, Any]:
        """For the epoch under way as it began, for the next one as it has begun already, or as things are now."""
        if not self._first:
            return {}
        inside = progress.position > 0 and not progress.epoch_trained
        epoch = progress.epoch if inside or progress.position == 0 else progress.epoch + 1
        return self._at_begin[epoch] if epoch in self._at_begin else self._now()

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        samplers = dict(_samplers_of(self._loader()))
        gone = [place for place in states if place not in samplers]
        if gone:
            _logger.warning(
                "The checkpoint holds the state of the loader's %s, which this loader has not: it is lost.",
                ", ".join(gone),
            )
        for place in states.keys() & samplers.keys():
            sampler, saved = samplers[place], states[place]
            if "state" in saved and _has_own_state(sampler):
                sampler.load_state_dict(decode(saved["state"]))
            for name, value in saved.get("attributes", {}).items():
                setattr(sampler, name, like(decode(value), getattr(sampler, name, None)))

    def _attributes(self, sampler: Any) -> Iterator[tuple[str, Any]]:
        """Those that may be saved; not the dataset, which would be looked through for each epoch."""
        loader = self._loader()
        elsewhere = [getattr(loader, "dataset", None), *loader_generators(loader).values()]
        for name, value in attributes_of(sampler).items():
            if not isinstance(value, nn.Module) and all(value is not other for other in elsewhere):
                yield name, value

    def _fingerprints(self, sampler: Any) -> dict[str, int]:
        found = {}
        for name, value in self._attributes(sampler) if not _has_own_state(sampler) else ():
            number = _fingerprint(value)
            if number is not None:
                found[name] = number
        return found

    def _changed(self, sampler: Any, first: Mapping[str, int]) -> dict[str, Any]:
        changed = {}
        for name, value in self._attributes(sampler):
            number = _fingerprint(value)
            if number is not None and number != first.get(name):
                changed[name] = encode(value, name)
        return changed


def _samplers_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Place and object of each sampler of the user's, those inside others too; of a loader that keeps a state itself none."""
    if loader is None or hasattr(type(loader), "load_state_dict"):
        return
    seen: set[int] = set()
    waiting = [(name, getattr(loader, name, None)) for name in ("batch_sampler", "sampler")]
    while waiting:
        place, sampler = waiting.pop(0)
        if sampler is None or id(sampler) in seen or isinstance(sampler, list | tuple | range):
            continue
        seen.add(id(sampler))
        waiting += [(f"{place}.{name}", inner) for name, inner in _inside(sampler)]
        if type(sampler) not in _WITHOUT_STATE:
            yield place, sampler


def _inside(sampler: Any) -> Iterator[tuple[str, Any]]:
    """The samplers that a sampler holds, in lists too."""
    for name, value in attributes_of(sampler).items():
        if name in ("sampler", "batch_sampler") or isinstance(value, Sampler):
            yield name, value
        elif isinstance(value, list | tuple) and 0 < len(value) <= _MOST and isinstance(value[0], Sampler):
            yield from ((f"{name}[{i}]", one) for i, one in enumerate(value) if isinstance(one, Sampler))


def _has_own_state(sampler: Any) -> bool:
    return all(callable(getattr(type(sampler), name, None)) for name in ("state_dict", "load_state_dict"))


def _fingerprint(value: Any) -> int | None:
    try:
        return fingerprint(value)
    except CheckpointError:  # a dataset, a function, a sampler
        return None


def _may_be_referred_to(loader: Any) -> bool:
    try:
        weakref.ref(loader)
    except TypeError:  # a list
        return False
    return True
