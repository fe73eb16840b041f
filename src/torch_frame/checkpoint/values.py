"""Values of many kinds in a file that runs no code: `encode` makes plain types and tensors of them, `decode` what they were.

Used for what users keep (the states of hooks, attributes, samplers); the rest of a state is plain by itself. A value that is not
plain becomes a dict with the key `__torch_frame__`, which names its kind; a user's dict that has this key is wrapped in one too,
so that the two cannot be mistaken for each other.

Kinds: numpy arrays and scalars of all dtypes, bytes, bytearrays, dates, times, time zones, paths, sets, named tuples, deques,
defaultdicts with a factory such as `list`, OrderedDicts, Counters, ranges, slices, Decimals, Fractions, UUIDs, enums, and
generators of random numbers (`random.Random`, numpy's and torch's). Enums and named tuples are looked up among the modules that
are loaded; nothing is imported and no constructor of theirs is called. What is held twice comes back as two; other subclasses of
int, float and str become these.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import functools
import operator
import pathlib
import random
import sys
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_frame.errors import CheckpointError

MARK = "__torch_frame__"
"""The key of a dict that stands for another value."""

_PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size})
_PATHS = (pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath, pathlib.PureWindowsPath)
_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (list, dict, set, frozenset, tuple, int, float, str, bool, bytes, complex, deque, Counter, OrderedDict)
}
_LAYOUTS = frozenset(
    {
        *(torch.strided, torch.jagged, torch.sparse_coo),
        *(torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
    }
)
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def encode(value: Any, place: str = "state") -> Any:
    """`value` in plain types and tensors; tensors stay what they are, arrays are copied.

    Args:
        value: any nesting of containers.
        place: where it is, for the message.

    Raises:
        CheckpointError: naming the place of what cannot be saved.

    >>> encode({"seen": {1}, "names": ["a"]})
    {'seen': {'__torch_frame__': 'set', 'items': [1]}, 'names': ['a']}
    """
    try:
        return _encoded(value, place)
    except RecursionError:
        raise CheckpointError(f"{place} contains itself, or is nested too deeply for a checkpoint.") from None


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
        CheckpointError: naming a class (of an enum, a named tuple) that the script has not, or has otherwise.

    >>> decode(encode({"seen": {1}, "when": datetime.date(2026, 1, 31)}))
    {'seen': {1}, 'when': datetime.date(2026, 1, 31)}
    """
    if isinstance(value, dict):
        if MARK in value:
            return _decoded(value)
        made = type(value)()
        for key, item in value.items():
            made[key] = decode(item)
        return made
    if type(value) is list or type(value) is tuple:
        return type(value)([decode(item) for item in value])
    return value


def encode_most(value: Any) -> Any:
    """`value` with all that can be encoded; the rest is left as it is, for `plain` to turn into what it can, or refuse."""
    try:
        return encode(value)
    except CheckpointError:
        if type(value) is dict:
            return {key: encode_most(item) for key, item in value.items()}
        return [encode_most(item) for item in value] if type(value) is list else value


def like(value: Any, other: Any) -> Any:
    """What takes the place of `other`: a value that was read, and so is on the CPU, on its device if both are tensors.

    A generator of random numbers stays the object that it is, for others may draw from it too.
    """
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return _moved(value, other.device)
    if type(value) is not type(other):
        return value
    if isinstance(value, torch.Generator) and value.device == other.device:
        other.set_state(value.get_state())
        return other
    if isinstance(value, random.Random):
        other.setstate(value.getstate())
        return other
    if isinstance(value, np.random.RandomState):
        other.set_state(value.get_state(legacy=False))
        return other
    return value


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """On a device; what is trained is so there too, and not the result of a move."""
    if not value.requires_grad or value.device == device:
        return value.to(device)
    moved = value.detach().to(device)
    return nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved.requires_grad_()


# ---------------------------------------------------------------- to plain types


def _encoded(value: Any, place: str) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(value, place)
    if isinstance(value, Tensor):
        tensor = _of_tensor(value, place)
        return _marked("trained_tensor", tensor=tensor.detach()) if value.requires_grad and value.is_leaf else tensor
    if isinstance(value, enum.Enum):
        return _of_enum(value, place)
    if isinstance(value, np.generic):
        return _marked("numpy_scalar", array=_of_array(np.asarray(value), place))
    if isinstance(value, np.dtype):
        return _marked("numpy_dtype", dtype=_of_dtype(value, place))
    if isinstance(value, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
        return _of_namedtuple(value, place)
    if isinstance(value, int | float | str):  # torch.__version__ and other subclasses of plain types
        return next(base(value) for base in (int, float, str) if isinstance(value, base))
    raise CheckpointError(
        f"{place} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: loading it would have to run code. "
        "Turn it into numbers, strings, lists, dicts, arrays or tensors in state_dict(), and back in load_state_dict()."
    )


def _of_tensor(value: Tensor, place: str) -> Tensor:
    kind = type(value)
    if is_lazy(value):
        what = "a tensor of a lazy layer that has not been called, so it has no values yet"
    elif value.device.type == "meta":
        what = "a tensor on the device meta, which has no values"
    elif value.layout not in _LAYOUTS or (value.is_nested and value.layout is torch.strided):
        name = "of the kind nested (with strides)" if value.is_nested else f"of the layout {value.layout}"
        what = f"a tensor {name}, which a checkpoint cannot hold"
    elif kind is Tensor or value.layout is torch.jagged or kind in torch.serialization.get_safe_globals():
        return value
    else:
        what = f"a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: loading it would have to run code"
    raise CheckpointError(f"{place} is {what}. Turn it into an ordinary tensor in state_dict(), or leave it out.")


def _of_parameter(value: nn.Parameter, place: str) -> Any:
    return _marked("Parameter", tensor=_of_tensor(value.detach(), place), grad=value.requires_grad)


def _marked(kind: str, **fields: Any) -> dict[str, Any]:
    return {MARK: kind, **fields}


def _items(values: Any, place: str) -> list[Any]:
    return [_encoded(item, f"{place}[{i}]") for i, item in enumerate(values)]


def _of_dict(value: dict[Any, Any], place: str) -> Any:
    made: dict[Any, Any] = type(value)()
    for key, item in value.items():
        made[key] = _encoded(item, f"{place}[{key!r}]")
    if MARK not in made and all(_is_plain_key(key) for key in made):
        return made
    return _marked("dict" if type(value) is dict else "OrderedDict", items=_pairs(value, made, place))


def _pairs(value: Mapping[Any, Any], encoded: Mapping[Any, Any], place: str) -> list[Any]:
    return [(_encoded(key, f"{place} (a key)"), encoded[key]) for key in value]


def _is_plain_key(key: Any) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(map(_is_plain_key, key)))


def _of_other_dict(kind: str, value: dict[Any, Any], place: str, **fields: Any) -> Any:
    encoded = {key: _encoded(item, f"{place}[{key!r}]") for key, item in value.items()}
    return _marked(kind, items=_pairs(value, encoded, place), **fields)


def _of_defaultdict(value: defaultdict[Any, Any], place: str) -> Any:
    factory = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        raise CheckpointError(
            f"{place} is a defaultdict whose factory is {factory!r}, which a checkpoint cannot hold: loading it would have "
            "to run code. Use a builtin type (list, int, ...) as its factory, or a dict."
        )
    return _of_other_dict("defaultdict", value, place, factory=None if factory is None else name)


def _of_array(value: np.ndarray, place: str) -> Any:
    if value.dtype == object:
        return _marked("object_array", shape=list(value.shape), items=_items(value.reshape(-1).tolist(), place))
    copied = value.copy(order="K")
    try:
        if value.dtype.isnative and value.dtype.names is None:
            return _marked("array", tensor=torch.from_numpy(copied))
    except TypeError:  # a dtype that torch has not
        pass
    data = np.frombuffer(value.tobytes(), dtype=np.uint8).copy()  # in C order
    return _marked(
        "array_bytes", dtype=_of_dtype(value.dtype, place), shape=list(value.shape), data=torch.from_numpy(data)
    )


def _of_dtype(dtype: np.dtype, place: str) -> Any:
    """numpy's own description of a dtype, of strings, lists and tuples."""
    if dtype.hasobject or dtype.metadata:
        raise CheckpointError(
            f"{place} has the dtype {dtype!r}, which a checkpoint cannot hold. Use one without objects."
        )
    description = np.lib.format.dtype_to_descr(dtype)
    if np.lib.format.descr_to_dtype(description) != dtype:
        raise CheckpointError(f"{place} has the dtype {dtype!r}, which a checkpoint cannot hold. Use another one.")
    return description


def _of_bytes(kind: str, value: bytes | bytearray, place: str) -> Any:
    return _marked(kind, data=torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy()))


def _of_datetime(value: datetime.datetime, place: str) -> Any:
    date = [value.year, value.month, value.day]
    return _marked(
        "datetime", fields=date + _of_clock(value), fold=value.fold, tz=_encoded(value.tzinfo, f"{place}.tzinfo")
    )


def _of_time(value: datetime.time, place: str) -> Any:
    return _marked("time", fields=_of_clock(value), fold=value.fold, tz=_encoded(value.tzinfo, f"{place}.tzinfo"))


def _of_clock(value: datetime.datetime | datetime.time) -> list[int]:
    return [value.hour, value.minute, value.second, value.microsecond]


def _of_timezone(value: datetime.timezone, place: str) -> Any:
    offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]  # as pickle asks it
    return _marked("timezone", offset=_encoded(offset, place), name=name)


def _of_zone(value: zoneinfo.ZoneInfo, place: str) -> Any:
    if value.key is None:
        raise CheckpointError(f"{place} is a time zone without a name, which a checkpoint cannot hold.")
    return _marked("ZoneInfo", key=value.key)


def _of_random(value: random.Random, place: str) -> Any:
    return _marked("Random", state=value.getstate())


def _of_numpy_generator(value: np.random.Generator, place: str) -> Any:
    bits, seeds = value.bit_generator, value.bit_generator.seed_seq
    name = type(bits).__name__
    if name not in _BIT_GENERATORS:
        raise CheckpointError(f"{place} draws from a {name}, which a checkpoint cannot hold. Use one of numpy's own.")
    spawning = None
    if type(seeds) is np.random.SeedSequence:  # what `spawn` goes by
        spawning = {**seeds.state, "spawn_key": tuple(seeds.spawn_key)}
    return _marked("numpy_Generator", name=name, state=_encoded(bits.state, place), seeds=_encoded(spawning, place))


def _of_random_state(value: np.random.RandomState, place: str) -> Any:
    return _marked("numpy_RandomState", state=_encoded(value.get_state(legacy=False), place))


def _of_enum(value: enum.Enum, place: str) -> Any:
    kind = type(value)
    path = _path_of(kind, place)
    names: list[str | None] = [value.name]
    if isinstance(value, enum.Flag):
        names = [member.name for member in value]
        if functools.reduce(operator.or_, (kind[str(name)] for name in names), kind(0)) is not value:
            raise CheckpointError(f"{place} is {value!r}, which is more than members of its class together.")
    return _marked("enum", of=path, names=names)


def _of_namedtuple(value: Any, place: str) -> Any:
    kind = type(value)
    return _marked("namedtuple", of=_path_of(kind, place), fields=list(kind._fields), items=_items(value, place))


def _path_of(kind: type, place: str) -> list[str]:
    path = [kind.__module__, kind.__qualname__]
    if _loaded_class(path) is not kind:
        raise CheckpointError(
            f"{place} is of the class {'.'.join(path)}, which cannot be found again when it is loaded. Define it at the top of a "
            "module, or turn it into a name or a number in state_dict()."
        )
    return path


def _loaded_class(path: list[str]) -> Any:
    module, qualname = path
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = None if found is None else vars(found).get(name)
    return found


_ENCODERS: dict[type, Callable[[Any, str], Any]] = {
    dict: _of_dict,
    OrderedDict: _of_dict,
    list: _items,
    tuple: lambda value, place: tuple(_items(value, place)),
    set: lambda value, place: _marked("set", items=_items(value, place)),
    frozenset: lambda value, place: _marked("frozenset", items=_items(value, place)),
    deque: lambda value, place: _marked("deque", items=_items(value, place), maxlen=value.maxlen),
    defaultdict: _of_defaultdict,
    Counter: functools.partial(_of_other_dict, "Counter"),
    nn.Parameter: _of_parameter,
    np.ndarray: _of_array,
    bytes: functools.partial(_of_bytes, "bytes"),
    bytearray: functools.partial(_of_bytes, "bytearray"),
    range: lambda value, place: _marked("range", of=[value.start, value.stop, value.step]),
    slice: lambda value, place: _marked("slice", of=_items([value.start, value.stop, value.step], place)),
    decimal.Decimal: lambda value, place: _marked("Decimal", text=str(value)),
    fractions.Fraction: lambda value, place: _marked("Fraction", of=[value.numerator, value.denominator]),
    uuid.UUID: lambda value, place: _marked("UUID", text=str(value)),
    datetime.date: lambda value, place: _marked("date", fields=[value.year, value.month, value.day]),
    datetime.datetime: _of_datetime,
    datetime.time: _of_time,
    datetime.timedelta: lambda value, place: _marked("timedelta", of=[value.days, value.seconds, value.microseconds]),
    datetime.timezone: _of_timezone,
    zoneinfo.ZoneInfo: _of_zone,
    random.Random: _of_random,
    np.random.Generator: _of_numpy_generator,
    np.random.RandomState: _of_random_state,
    torch.Generator: lambda value, place: _marked("torch_Generator", device=str(value.device), state=value.get_state()),
    **dict.fromkeys(_PATHS, lambda value, place: _marked("path", name=type(value).__name__, text=str(value))),
}


# ---------------------------------------------------------------- and back


def _decoded(value: Mapping[str, Any]) -> Any:
    kind = value[MARK]
    if kind not in _DECODERS:
        raise CheckpointError(
            f"The checkpoint holds a value of the kind {kind!r}, which this torch-frame does not know."
        )
    return _DECODERS[kind](value)


def _to_dict(make: Callable[[], Any], value: Mapping[str, Any]) -> Any:
    made = make()
    for key, item in value["items"]:
        made[decode(key)] = decode(item)
    return made


def _to_list(value: Mapping[str, Any]) -> list[Any]:
    return [decode(item) for item in value["items"]]


def _to_object_array(value: Mapping[str, Any]) -> np.ndarray:
    made = np.empty(len(value["items"]), dtype=object)
    for i, item in enumerate(value["items"]):
        made[i] = decode(item)
    return made.reshape(value["shape"])


def _to_array(value: Mapping[str, Any]) -> np.ndarray:
    dtype = np.lib.format.descr_to_dtype(value["dtype"])
    return np.frombuffer(_to_bytes(value), dtype=dtype).reshape(value["shape"]).copy()


def _to_bytes(value: Mapping[str, Any]) -> bytes:
    data: bytes = value["data"].cpu().numpy().tobytes()
    return data


def _to_path(value: Mapping[str, Any]) -> pathlib.PurePath:
    pure = {"PurePosixPath": pathlib.PurePosixPath, "PureWindowsPath": pathlib.PureWindowsPath}
    return pure.get(value["name"], pathlib.Path)(value["text"])


def _to_random(value: Mapping[str, Any]) -> random.Random:
    generator = random.Random(0)
    generator.setstate(value["state"])
    return generator


def _to_numpy_generator(value: Mapping[str, Any]) -> np.random.Generator:
    assert value["name"] in _BIT_GENERATORS
    seeds = decode(value["seeds"])
    bits = getattr(np.random, value["name"])(0 if seeds is None else np.random.SeedSequence(**seeds))
    bits.state = decode(value["state"])
    return np.random.Generator(bits)


def _to_random_state(value: Mapping[str, Any]) -> np.random.RandomState:
    state = decode(value["state"])
    generator = np.random.RandomState(getattr(np.random, state["bit_generator"])(0))
    generator.set_state(state)
    return generator


def _to_torch_generator(value: Mapping[str, Any]) -> torch.Generator:
    device = torch.device(value["device"])
    if device.type != "cpu" and not torch.accelerator.is_available():
        raise CheckpointError(f"The checkpoint holds a generator of {device}, which this machine has not.")
    generator = torch.Generator(device)
    generator.set_state(value["state"].cpu())
    return generator


def _to_enum(value: Mapping[str, Any]) -> enum.Enum:
    kind = _class_for(value, enum.Enum)
    unknown = [name for name in value["names"] if name not in kind.__members__]
    if unknown:
        raise CheckpointError(
            f"The checkpoint holds {value['of'][1]}.{unknown[0]}, but the script's class has no such member."
        )
    members = [kind.__members__[name] for name in value["names"]]
    if issubclass(kind, enum.Flag):
        members = [functools.reduce(operator.or_, members, kind(0))]
    found: enum.Enum = members[0]
    return found


def _to_namedtuple(value: Mapping[str, Any]) -> Any:
    kind = _class_for(value, tuple)
    fields = list(getattr(kind, "_fields", ()))
    if fields != value["fields"]:
        raise CheckpointError(
            f"The checkpoint holds a {value['of'][1]} with the fields {', '.join(value['fields'])}; the script's has "
            f"{', '.join(fields) or 'none'}."
        )
    return tuple.__new__(kind, _to_list(value))


def _class_for(value: Mapping[str, Any], base: type) -> Any:
    kind = _loaded_class(value["of"])
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise CheckpointError(
            f"The checkpoint holds a value of the class {'.'.join(value['of'])}, but no module that is loaded has it. Import it, "
            "or define it where it was, before the checkpoint is loaded."
        )
    return kind


_DECODERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "dict": functools.partial(_to_dict, dict),
    "OrderedDict": functools.partial(_to_dict, OrderedDict),
    "Counter": functools.partial(_to_dict, Counter),
    "defaultdict": lambda value: _to_dict(lambda: defaultdict(_FACTORIES.get(value["factory"] or "")), value),
    "set": lambda value: set(_to_list(value)),
    "frozenset": lambda value: frozenset(_to_list(value)),
    "deque": lambda value: deque(_to_list(value), value["maxlen"]),
    "trained_tensor": lambda value: value["tensor"].requires_grad_(),
    "Parameter": lambda value: nn.Parameter(value["tensor"], value["grad"]),
    "array": lambda value: value["tensor"].cpu().numpy(),
    "array_bytes": _to_array,
    "object_array": _to_object_array,
    "numpy_scalar": lambda value: decode(value["array"])[()],
    "numpy_dtype": lambda value: np.lib.format.descr_to_dtype(value["dtype"]),
    "bytes": _to_bytes,
    "bytearray": lambda value: bytearray(_to_bytes(value)),
    "range": lambda value: range(*value["of"]),
    "slice": lambda value: slice(*decode(value["of"])),
    "Decimal": lambda value: decimal.Decimal(value["text"]),
    "Fraction": lambda value: fractions.Fraction(*value["of"]),
    "UUID": lambda value: uuid.UUID(value["text"]),
    "date": lambda value: datetime.date(*value["fields"]),
    "datetime": lambda value: datetime.datetime(*value["fields"]).replace(
        tzinfo=decode(value["tz"]), fold=value["fold"]
    ),
    "time": lambda value: datetime.time(*value["fields"]).replace(tzinfo=decode(value["tz"]), fold=value["fold"]),
    "timedelta": lambda value: datetime.timedelta(*value["of"]),
    "timezone": lambda value: datetime.timezone(decode(value["offset"]), *value["name"]),
    "ZoneInfo": lambda value: zoneinfo.ZoneInfo(value["key"]),
    "path": _to_path,
    "Random": _to_random,
    "numpy_Generator": _to_numpy_generator,
    "numpy_RandomState": _to_random_state,
    "torch_Generator": _to_torch_generator,
    "enum": _to_enum,
    "namedtuple": _to_namedtuple,
}
