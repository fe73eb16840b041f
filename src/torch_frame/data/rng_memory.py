"""Where python's, numpy's and torch's generators stand, read from their memory, which takes a tenth of the time.

All three are Mersenne twisters: 624 words and an index, and a number or two kept beside them (the second one of a pair of
normal numbers). A mark is the index, what is kept, and a few of the words, all of which change when the index comes around.

Each way of reading is tried at import, against the public state; where one does not hold (another Python, numpy or torch), the
states are compared instead: slower, the same.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torch_frame.data.rng import numpy_random, python_generator

_NUM_WORDS = 624
_WORDS = struct.Struct(f"={_NUM_WORDS}I")
_HEAD, _SIZE = object.__basicsize__, 4 + _WORDS.size
_MAGIC = 1.2345678901234567  # a number that is found again in memory

Mark = Callable[[], Any]
"""Returns where a generator is; two results are equal if it has not moved between them."""


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


# ---------------------------------------------------------------- python: an index and 624 words behind the object's head


def _mark_of_python(generator: Any) -> Mark:
    words = _view(id(generator) + _HEAD, _SIZE).cast("I")
    return lambda: (words[0], words[2], words[398], words[624], generator.gauss_next)


def _copy_of_python(generator: Any) -> Any:
    return ctypes.string_at(id(generator) + _HEAD, _SIZE), generator.gauss_next


def _state_of_python(copy: Any) -> Any:
    memory, gauss = copy
    return 3, (*_WORDS.unpack(memory[4:]), int.from_bytes(memory[:4], sys.byteorder)), gauss


def _python_is_known() -> bool:
    generator = random.Random(1)
    if type(generator).__base__.__basicsize__ < _HEAD + _SIZE:  # type: ignore[union-attr]
        return False
    mark = _mark_of_python(generator)
    for _ in range(3):
        if _state_of_python(_copy_of_python(generator)) != generator.getstate() or mark() != mark():
            return False
        before = mark()
        generator.random()
        if mark() == before:
            return False
    return True


# ---------------------------------------------------------------- numpy: 624 words and an index, shown to C


def _mark_of_numpy(generator: Any) -> Mark:
    words = _view(generator.ctypes.state_address, _SIZE).cast("I")
    return lambda: (words[624], words[1], words[397])


def _state_of_numpy(generator: Any) -> Any:
    state = generator.state["state"]
    return state["key"].tobytes(), state["pos"]


def _numpy_is_known() -> bool:
    generator = np.random.MT19937(1)
    words = _view(generator.ctypes.state_address, _SIZE).cast("I")
    for _ in range(3):
        if (words[:624].tobytes(), words[624]) != _state_of_numpy(generator):
            return False
        generator.random_raw()
    return True


def _find_gauss() -> memoryview | None:
    """Of numpy's global RandomState: a view of the flag that says that it keeps a normal number; None if it is not found."""
    try:
        own, shown = numpy_random.RandomState(0), numpy_random.mtrand._rand
        if type(own) is not type(shown):
            return None
        state = list(own.get_state(legacy=True))
        own.set_state((*state[:3], 1, _MAGIC))
        size = type(own).__basicsize__
        place = ctypes.string_at(id(own), size).find(struct.pack("=d", _MAGIC)) - 8
        if place < _HEAD:
            return None
        flags = []
        for _ in range(3):
            flags.append(_view(id(own) + place, 4).cast("i")[0])
            own.standard_normal()
        view = _view(id(shown) + place, 4).cast("i")
        holds = flags == [1, 0, 1] and view[0] == shown.get_state(legacy=False)["has_gauss"]
    except (AttributeError, TypeError, ValueError):
        return None
    return view if holds else None


# ---------------------------------------------------------------- torch: seed, counts and words in C++, then what is kept

_ENGINE_HEAD = 20
"""Bytes before the words: the seed, how many words are left, a flag, the index of the next."""
_KEPT = 24
"""Bytes behind them: a float and a double that may be kept."""


def _mark_of_torch(address: int, place: int) -> Mark:
    head, kept = address + place - _ENGINE_HEAD, address + place + 4 * _NUM_WORDS
    read = ctypes.string_at
    return lambda: read(head, _ENGINE_HEAD + 8) + read(kept, _KEPT)


def _bytes_of_torch() -> bytes:
    state = torch.default_generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.numel())  # .numpy().tobytes() takes 2 us longer


def _words_of_torch(generator: torch.Generator) -> list[int]:
    words: list[int] = generator.get_state()[24 : 24 + 8 * _NUM_WORDS].view(torch.int64).tolist()
    return words


def _find_torch() -> Mark | None:
    """A mark of torch's global generator by its memory; None if that is not as it was seen to be."""
    try:
        own = torch.Generator().manual_seed(1)
        place = ctypes.string_at(own._cdata, 256).find(struct.pack("=8I", *_words_of_torch(own)[:8]))  # type: ignore[attr-defined]
        if place < _ENGINE_HEAD or type(own) is not type(torch.default_generator):
            return None
        mark = _mark_of_torch(own._cdata, place)  # type: ignore[attr-defined]
        for draw in (_uniform, _normal, _normal, _nothing, _block):
            before = mark()
            own.get_state(), own.initial_seed()
            same = mark() == before
            draw(own)
            if not same or (mark() == before) != (draw is _nothing):
                return None
        address = torch.default_generator._cdata  # type: ignore[attr-defined]
        words = struct.pack(f"={_NUM_WORDS}I", *_words_of_torch(torch.default_generator))
        holds = ctypes.string_at(address + place, len(words)) == words
    except (AttributeError, TypeError, struct.error):
        return None
    return _mark_of_torch(address, place) if holds else None


def _uniform(generator: torch.Generator) -> None:
    torch.rand(1, generator=generator)


def _normal(generator: torch.Generator) -> None:
    torch.randn(1, generator=generator)


def _nothing(generator: torch.Generator) -> None:
    pass


def _block(generator: torch.Generator) -> None:
    torch.empty(_NUM_WORDS, dtype=torch.int32).random_(generator=generator)


# ---------------------------------------------------------------- what the others use

READS_PYTHON, READS_NUMPY = _python_is_known(), _numpy_is_known()
_gauss = _find_gauss()
_by_memory = _find_torch()
READS_GAUSS, READS_TORCH = _gauss is not None, _by_memory is not None

mark_of_python: Mark = _mark_of_python(python_generator) if READS_PYTHON else random.getstate
mark_of_torch: Mark = _by_memory or _bytes_of_torch


def mark_of_numpy(generator: Any) -> Mark:
    """A mark of one MT19937 bit generator, which lives as long as it does."""
    return _mark_of_numpy(generator) if READS_NUMPY else lambda: _state_of_numpy(generator)


def copy_python() -> Any:
    """Where python's global generator is, for `put_python`."""
    return _copy_of_python(python_generator) if READS_PYTHON else random.getstate()


def put_python(copy: Any) -> None:
    """Put python's global generator to where it was copied."""
    python_generator.setstate(_state_of_python(copy) if READS_PYTHON else copy)


def numpy_keeps_a_number() -> bool:
    """Whether numpy's global generator keeps the second one of a pair of normal numbers."""
    return bool(_gauss[0]) if _gauss is not None else bool(get_small_state()["has_gauss"])


_small = np.random.SFC64(0)


def get_small_state() -> dict[str, Any]:
    """Of numpy's global generator, what it keeps: the state of a small generator stands for its own."""
    state: dict[str, Any] = _with_small_generator(numpy_random.get_state, False)  # legacy=False: a dictionary
    return state


def set_small_state(state: dict[str, Any]) -> None:
    """Give numpy's global generator what another kept."""
    _with_small_generator(numpy_random.set_state, state)


def _with_small_generator(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call numpy's `get_state` or `set_state` while a generator with a small state stands in for the global one.

    If numpy has no such attributes any more, the function copies the whole state: slower, but the same.
    """
    try:
        generator = numpy_random.mtrand._rand
        shown, generator._bit_generator = generator._bit_generator, _small
    except AttributeError:
        return function(argument)
    try:
        return function(argument)
    finally:
        generator._bit_generator = shown
