"""Reading a file of pickled objects without running anything that it names.

torch's own reader (`weights_only=True`) makes tensors and plain types, and calls nothing that is not on its list. While a file is
read, everything else that it names is put on that list as a stand-in of ours, which keeps what it is given or forgets it.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_frame.errors import CheckpointError

_RUNS_CODE = {
    *("os", "posix", "nt", "sys", "subprocess", "shutil", "pty", "webbrowser"),
    *("runpy", "importlib", "ctypes", "_ctypes", "code", "codeop", "pickle", "_pickle", "marshal"),
}
_BUILTINS_THAT_RUN_CODE = frozenset(
    {"eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint", "input"}
)


class Record:
    """An object of which only its attributes are kept."""


class LeftOut:
    """Stands where an object of an unknown class was, or what an unknown function would have made; a subclass for each name."""

    def __init__(self, *args: Any) -> None:
        """Whatever it was made of is forgotten."""

    def __setstate__(self, state: Any) -> None:
        """Whatever it held is forgotten."""


def read(path: Path, known: Mapping[str, Callable[..., Any]]) -> Any:
    """Read a file of `torch.save`, in the zip format or the one before it.

    Args:
        path: the file.
        known: "module.name" as the file names it -> what is made in its place: `Record` keeps the attributes of an object,
            OrderedDict those and the items of a dict's subclass.

    Returns:
        Tensors (on the CPU), plain types, deques, NumPy arrays, NumPy scalars as Python numbers, what `known` made, and `LeftOut`
        for all else.

    Raises:
        CheckpointError: where there is no such file, it is damaged, made to run code, or cannot be read this way.
    """
    try:
        names = _names(path)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except Exception as error:  # the file may hold anything
        raise CheckpointError(f"{path} cannot be read: it is damaged, or no checkpoint ({_short(error)}).") from error
    harmful = sorted(name for name in names if _runs_code(name))
    if harmful:
        raise CheckpointError(
            f"{path} asks for {', '.join(harmful)} when it is read. A checkpoint has no use for that: it is made to run code on "
            "the machine that loads it. Nothing of it was run, and nothing is taken over. Do not load it with weights_only=False."
        )
    try:
        stand_ins: dict[str, Callable[..., Any]] = {**{name: _left_out(name) for name in names}, **_STAND_INS, **known}
        with _only(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that is refused right afterwards
            return _settled(torch.load(path, map_location="cpu", weights_only=True), {})
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something that cannot be read without running its code ({_short(error)})."
        ) from error
    except Exception as error:  # the file may hold anything
        raise CheckpointError(f"{path} cannot be read: it is damaged, or no checkpoint ({_short(error)}).") from error


def _names(path: Path) -> set[str]:
    """Each class and function that the file names, found without unpickling.

    Raises:
        Exception: of many kinds, for a file that is damaged.
    """
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not is_zip:  # torch before 1.6: magic number, version, system and object, a pickle each, then the tensors
            return set().union(*(_names_of_pickle(file) for _ in range(4)))
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip() or next((part.filename for part in archive.infolist() if _is_odd(part)), None)
            if broken is not None:
                raise ValueError(f"{broken} is broken")
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return set().union(*(_names_of_pickle(archive.read(name)) for name in pickles))


def _is_odd(part: zipfile.ZipInfo) -> bool:
    """Torch would read something else than the checksum is of: the part's entry has another size, or calls it a folder."""
    is_folder = bool(part.external_attr & 0x10)
    return is_folder or (part.compress_type == zipfile.ZIP_STORED and part.compress_size != part.file_size)


def _names_of_pickle(content: Any) -> set[str]:
    return {
        _todays_name(*str(argument).split(" "))
        for code, argument, _ in pickletools.genops(content)
        if code.name == "GLOBAL"
    }


def _todays_name(module: str, name: str) -> str:
    """Protocol 2, which torch writes, has Python 2's names for what was renamed."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _runs_code(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module == "builtins":
        return last in _BUILTINS_THAT_RUN_CODE
    return module.partition(".")[0] in _RUNS_CODE


def _left_out(name: str) -> type[LeftOut]:
    module, _, last = name.rpartition(".")
    return type(last, (LeftOut,), {"__module__": module})


@contextlib.contextmanager
def _only(stand_ins: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put the stand-ins on torch's list in place of what the process has put there.

    The list is the process's: a `torch.load` in another thread finds it changed meanwhile, and nothing more that could run.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# ---------------------------------------------------------------- stand-ins for what a checkpoint may well hold


class _MaxLen:
    """The first element of a list that stands for a deque."""

    def __init__(self, value: int | None) -> None:
        self.value = value


def _deque(items: Any = (), maxlen: int | None = None) -> list[Any]:
    return [_MaxLen(maxlen), *items]  # torch's reader appends to lists alone


def _dict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _empty_bytes(*_: Any) -> bytes:
    return b""  # others go through _codecs.encode


class _DType:
    """numpy.dtype(code, align, copy); its state's second element is the byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def decoded(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        if dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"a NumPy value of dtype {self.code}")
        return dtype if self.order == "|" else dtype.newbyteorder(self.order)  # type: ignore[arg-type]  # from a file


def _scalar(dtype: _DType, content: bytes) -> Any:
    return np.frombuffer(content, dtype.decoded(), count=1)[0].item()


class _Array:
    """numpy.ndarray, and the function that makes an empty one for a state to be put into."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def decoded(self) -> np.ndarray[Any, Any]:
        _, shape, dtype, is_fortran, content = self.state
        return np.frombuffer(content, dtype.decoded()).reshape(shape, order="F" if is_fortran else "C").copy()


_STAND_INS: Mapping[str, Callable[..., Any]] = {
    "collections.deque": _deque,
    "collections.defaultdict": _dict,
    "builtins.bytes": _empty_bytes,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
}


def _settled(value: Any, done: dict[int, Any]) -> Any:
    """`value` with deques and arrays where their stand-ins are.

    Args:
        value: any nesting; it may hold itself, as 1.7's MetricStorage does.
        done: id -> what was made of it.
    """
    if id(value) in done:
        return done[id(value)]
    made: Any = value
    if type(value) is list:
        is_deque = bool(value) and type(value[0]) is _MaxLen
        made = done[id(value)] = deque(maxlen=value[0].value) if is_deque else []
        made.extend(_settled(item, done) for item in (value[1:] if is_deque else value))
    elif type(value) is tuple:
        made = tuple(_settled(item, done) for item in value)
    elif type(value) in (dict, OrderedDict, Record):
        made = done[id(value)] = type(value)()
        if type(value) is not Record:
            made.update((_settled(key, done), _settled(item, done)) for key, item in value.items())
        if type(value) is not dict:
            vars(made).update((key, _settled(item, done)) for key, item in vars(value).items())
    elif type(value) is _Array:
        made = value.decoded()
    return made


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
