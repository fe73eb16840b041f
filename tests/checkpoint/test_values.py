"""What users keep comes back as it was, through a file that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import pathlib
import random
import sys
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_frame.checkpoint.digest import fingerprint
from torch_frame.checkpoint.format import plain
from torch_frame.checkpoint.snapshot import HostBuffers
from torch_frame.checkpoint.values import MARK, decode, encode, like
from torch_frame.errors import CheckpointError


class Stage(enum.Enum):
    WARM = "warm"
    HOT = ("hot", [1])


class Level(enum.IntEnum):
    LOW = 1


class Text(enum.StrEnum):
    A = "a"


class Parts(enum.Flag):
    HEAD = 1
    BODY = 2


class Point(NamedTuple):
    x: Any
    y: Any


class Outer:
    class Inner(enum.Enum):
        ONE = 1


def through_a_file(value: Any, folder: Path) -> Any:
    path = folder / "value.pth"
    torch.save(plain(encode(value)), path)
    return decode(torch.load(path, weights_only=True))


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, inside too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if a.dtype == object:
            return a.shape == b.shape and all(same(x, y) for x, y in zip(a.flat, b.flat, strict=True))
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, dict):
        factories = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return factories and len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, deque):
        return a.maxlen == b.maxlen and same(list(a), list(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, datetime.datetime | datetime.time):
        return a == b and a.fold == b.fold and same(a.tzinfo, b.tzinfo)
    return bool(a == b) or repr(a) == repr(b)


DTYPES = ["bool", "i1", "u2", "u4", "u8", "i8", "f2", "f4", "f8", "c8", "c16", "longdouble", ">i4", ">f8"]
VALUES: dict[str, Any] = {
    **{f"array {dtype}": np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype) for dtype in DTYPES},
    **{f"scalar {dtype}": np.dtype(dtype).type(1) for dtype in DTYPES if dtype[0] != ">" and dtype != "longdouble"},
    "array of no dimension": np.array(2.5),
    "empty array": np.zeros((0, 3)),
    "array in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "array read backwards": np.arange(4)[::-1],
    "array of texts": np.array([["cat", "Maus ü"]]),
    "array of bytes": np.array([b"a", b"bcd"]),
    "array of times": np.array(["2026-01-31", "NaT"], dtype="datetime64[D]"),
    "array of durations": np.array([1, 2], dtype="timedelta64[ms]"),
    "structured array": np.array(
        [(1, 2.0, "a", [1, 2])], dtype=[("i", "i4"), ("f", "f8"), ("s", "U3"), ("v", "u1", (2,))]
    ),
    "structured scalar": np.array([(1, 2.0)], dtype=[("i", "i4"), ("f", "f8")])[0],
    "array of objects": np.array([1, "a", None, b"x"], dtype=object).reshape(2, 2),
    "numpy text": np.str_("abc"),
    "numpy time": np.datetime64("2026-01-31T12:00"),
    "numpy dtype": np.dtype([("i", "i4")]),
    "bytes": b"\x00\xff",
    "no bytes": b"",
    "bytearray": bytearray(b"ab\x00"),
    "date": datetime.date(2026, 1, 31),
    "datetime": datetime.datetime(2026, 1, 31, 12, 30, 5, 7, fold=1),
    "datetime of a zone": datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC),
    "time": datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2), "here")),
    "timedelta": datetime.timedelta(-1, 5, 7),
    "path": pathlib.Path("a") / "b.txt",
    "pure path": pathlib.PureWindowsPath("C:\\a"),
    "set": {1, 2, "a", (1, 2)},
    "set of more": {Stage.HOT, pathlib.Path("a"), frozenset({1}), b"x"},
    "frozenset": frozenset({1.5}),
    "tuple": (1, [2, ()]),
    "named tuple": Point({1}, Point(None, b"y")),
    "torch.Size": torch.Size([1, 2]),
    "deque": deque([1, b"a", Stage.WARM], maxlen=3),
    "deque without an end": deque([1]),
    "defaultdict": defaultdict(list, {"a": [b"x"]}),
    "defaultdict without a factory": defaultdict(None, {1: 2}),
    "OrderedDict": OrderedDict([("b", 1), ("a", {2})]),
    "OrderedDict by enum": OrderedDict([(Stage.HOT, 1)]),
    "Counter": Counter({"a": 2, ("b", 1): 0}),
    "range": range(1, 10, 3),
    "slice": slice(None, np.int64(3), None),
    "Decimal": decimal.Decimal("-1.20"),
    "Decimal NaN": decimal.Decimal("NaN"),
    "Fraction": fractions.Fraction(-1, 3),
    "UUID": uuid.UUID(int=7),
    "enum": Stage.HOT,
    "enum of a class in a class": Outer.Inner.ONE,
    "IntEnum": Level.LOW,
    "StrEnum": Text.A,
    "flags": Parts.HEAD | Parts.BODY,
    "one flag": Parts.BODY,
    "no flag": Parts(0),
    "dict by anything": {
        Stage.WARM: 1,
        np.int64(3): 2,
        (1, "a"): 3,
        pathlib.Path("p"): 4,
        1.5: 5,
        None: 6,
        (1, b"b"): 7,
    },
    "dict by numbers": {0: "a", 1: "b"},
    "a user's dict that looks like ours": {MARK: "set", "items": [1]},
    "a user's dict with our key inside": {"a": [{MARK: {MARK: 3}}]},
    "big numbers": [2**127, -(2**200), float("inf"), -0.0],
    "complex": 1 + 2j,
    "torch's": [torch.float16, torch.device("cpu"), None, True],
    "tensor": torch.arange(3),
    "Parameter": nn.Parameter(torch.ones(2)),
    "frozen Parameter": nn.Parameter(torch.ones(2), requires_grad=False),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_value_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    came = through_a_file({"of": [value]}, tmp_path)["of"][0]
    assert same(came, value), f"{value!r} came back as {came!r}"
    assert isinstance(value, set) or fingerprint(came) == fingerprint(value)  # a set's order is its own


def test_a_zone_of_the_machine_comes_back(tmp_path: Path) -> None:
    try:
        zone = zoneinfo.ZoneInfo("Europe/Berlin")
    except zoneinfo.ZoneInfoNotFoundError:
        pytest.skip("no time zones here")
    when = datetime.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zone)
    assert same(through_a_file(when, tmp_path), when)


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "Random": (lambda: random.Random(3), lambda r: (r.random(), r.gauss(0, 1))),
    **{
        name: (
            lambda name=name: np.random.Generator(getattr(np.random, name)(3)),
            lambda g: (g.random(2).tolist(), g.integers(9)),
        )
        for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
    },
    "RandomState": (lambda: np.random.RandomState(3), lambda r: (r.rand(2).tolist(), r.randn())),
    "torch.Generator": (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(2, generator=g).tolist()),
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS)
def test_a_generator_continues_where_it_was(make: Any, draw: Any, tmp_path: Path) -> None:
    generator = make()
    draw(generator)
    came = through_a_file(generator, tmp_path)
    assert type(came) is type(generator)
    assert draw(came) == draw(generator)


def test_a_numpy_generator_spawns_the_children_that_it_would_have(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    generator.spawn(2)
    came = through_a_file(generator, tmp_path)
    assert came.spawn(1)[0].random() == generator.spawn(1)[0].random()


def test_an_array_does_not_follow_the_users() -> None:
    array = np.zeros(2)
    encoded = encode(array)
    array += 1
    assert decode(encoded).tolist() == [0, 0]


class Other:
    pass


def local_enum() -> Any:
    class Local(enum.Enum):
        ONE = 1

    return Local.ONE


class Named(Tensor):
    """A tensor of a user's class."""


itself: list[Any] = []
itself.append(itself)
REFUSED = {
    "object": (Other(), "values.Other"),
    "lambda": (lambda: 0, "function"),
    "module": (nn.Linear(1, 1), "Linear"),
    "defaultdict of a lambda": (defaultdict(lambda: 0), "factory"),
    "enum of a function": (local_enum(), "local_enum"),
    "itself": (itself, "contains itself"),
    "masked array": (np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
    "dict of another class": (type("Settings", (dict,), {})(), "Settings"),
    "memory": (memoryview(b"a"), "memoryview"),
    "tensor of a user's class": (torch.zeros(2).as_subclass(Named), "values.Named"),
    "parameter of a user's class": (nn.Parameter(torch.zeros(2).as_subclass(Named)), "values.Named"),
    "tensor without values": (torch.empty(2, device="meta"), "the device meta"),
    "parameter of a lazy layer": (nn.UninitializedParameter(), "a lazy layer"),
    "buffer of a lazy layer": (nn.UninitializedBuffer(), "a lazy layer"),
    "tensor of mkldnn": (torch.zeros(2).to_mkldnn(), "the layout torch._mkldnn"),
}


@pytest.mark.parametrize(("value", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_place(value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"hook\['a'\]\[1\].*{says}|hook.*{says}"):
        encode({"a": [0, value]}, "hook")


@pytest.mark.parametrize("value", [value for value, _ in REFUSED.values() if isinstance(value, Tensor)])
def test_what_cannot_be_saved_has_no_fingerprint(value: Tensor) -> None:
    with pytest.raises(CheckpointError):
        fingerprint([value])


def test_a_jagged_tensor_is_saved_and_has_a_fingerprint() -> None:
    def made(first: float) -> Tensor:
        return torch.nested.nested_tensor([torch.tensor([first]), torch.zeros(3)], layout=torch.jagged)

    assert encode({"rows": made(1.0)})["rows"].values().tolist() == [1, 0, 0, 0]
    assert fingerprint(made(1.0)) == fingerprint(made(1.0)) != fingerprint(made(2.0))


def test_a_class_that_is_not_there_is_told_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(Stage.HOT)
    encoded["of"][0] = "turtle"
    with pytest.raises(CheckpointError, match=r"turtle\.Stage"):
        decode(encoded)
    assert "turtle" not in sys.modules
    encoded = encode(Point(1, 2))
    encoded["fields"] = ["x"]
    with pytest.raises(CheckpointError, match="fields x"):
        decode(encoded)
    encoded = encode(Stage.HOT)
    encoded["names"] = ["COLD"]
    with pytest.raises(CheckpointError, match="COLD"):
        decode(encoded)


def test_only_enums_and_named_tuples_are_looked_up() -> None:
    with pytest.raises(CheckpointError, match="no module that is loaded has it"):
        decode({MARK: "enum", "of": ["os", "system"], "names": ["a"]})
    with pytest.raises(CheckpointError, match="no module that is loaded has it"):
        decode({MARK: "namedtuple", "of": ["pathlib", "Path"], "fields": [], "items": []})


def test_a_tensor_goes_to_the_device_of_the_one_that_it_replaces() -> None:
    value = torch.ones(2)
    assert like(value, torch.zeros(2, device="meta")).device.type == "meta"
    assert like(value, None) is like(value, 3) is value
    assert like(3, value) == 3


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_tensor_that_is_trained_comes_back_as_one(is_trained: bool, tmp_path: Path) -> None:
    """A temperature of one's own, as SAC has it."""
    value = torch.tensor([0.5], requires_grad=is_trained)
    saved = HostBuffers().copy(plain(encode({"alpha": value, "seen": value * 2}))).content
    torch.save(saved, tmp_path / "value.pth")
    back = decode(torch.load(tmp_path / "value.pth"))
    assert torch.equal(back["alpha"], value.detach())
    assert (back["alpha"].requires_grad, back["alpha"].is_leaf) == (is_trained, True)
    assert not back["seen"].requires_grad  # a result has no graph in a file
    moved = like(back["alpha"], torch.zeros(1, device="meta"))
    assert (moved.requires_grad, moved.is_leaf, moved.device.type) == (is_trained, True, "meta")
