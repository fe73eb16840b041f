"""What a file of pickled objects names is never run, however it is hidden; plain content comes as it is."""

from __future__ import annotations

import builtins
import copyreg
import functools
import operator
import os
import pickle
import runpy
import subprocess
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.small_runs import differences
from torch_frame import CheckpointError
from torch_frame.checkpoint import inert


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


class Counted:
    """An object that notes when it is made or filled."""

    num_made = 0

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: Any) -> None:
        Counted.num_made += 1


def command(harm: Path) -> str:
    return f'echo harm > "{harm}"'


def nested(harm: Path) -> bytes:
    """A file of torch.save inside the file, for a function of torch's that loads such bytes."""
    inner = harm.with_suffix(".inner")
    torch.save(Calls(os.system, command(harm)), inner)
    return inner.read_bytes()


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda harm: Calls(os.system, command(harm)),
    "subprocess": lambda harm: Calls(subprocess.call, ["touch", str(harm)]),
    "eval": lambda harm: Calls(eval, f"open({str(harm)!r}, 'w').close()"),
    "exec": lambda harm: Calls(exec, f"open({str(harm)!r}, 'w').close()"),
    "open": lambda harm: Calls(operator.methodcaller("close"), Calls(open, str(harm), "w")),
    "runpy": lambda harm: Calls(runpy.run_path, str(script(harm))),
    "method of a Path": lambda harm: Calls(Path.touch, harm),
    "functools.partial": lambda harm: Calls(operator.call, Calls(functools.partial, Path.touch, harm)),
    "getattr": lambda harm: Calls(operator.call, Calls(getattr, harm, "touch")),
    "methodcaller": lambda harm: Calls(operator.call, Calls(operator.methodcaller, "touch"), harm),
    "map": lambda harm: Calls(list, Calls(map, Path.touch, [harm])),
    "torch's own loader": lambda harm: Calls(torch.storage._load_from_bytes, nested(harm)),
    "numpy.load": lambda harm: Calls(np.load, str(object_array(harm)), None, True),
    "state of a reduced object": lambda harm: Calls(
        copyreg._reconstructor, Counted, object, None, state=Calls(os.system, command(harm))
    ),
    "key of a dict": lambda harm: {Calls(os.system, command(harm)): 1},
    "element of a deque": lambda harm: deque([Calls(os.system, command(harm))], maxlen=3),
    "array of objects": lambda harm: np.array([Calls(os.system, command(harm))], dtype=object),
    "factory of a defaultdict": lambda harm: defaultdict(functools.partial(Path.touch, harm), {0: Calls(Path.touch, harm)}),
    "attribute of an OrderedDict": lambda harm: Calls(
        OrderedDict, state={"__class__": Calls(os.system, command(harm))}
    ),
    "attribute of a model": lambda harm: with_attribute(nn.Linear(1, 1), Calls(os.system, command(harm))),
}  # fmt: skip


def script(harm: Path) -> Path:
    path = harm.with_suffix(".py")
    path.write_text(f"open({str(harm)!r}, 'w').close()")
    return path


def object_array(harm: Path) -> Path:
    path = harm.with_suffix(".npy")
    np.save(path, np.array([Calls(os.system, command(harm))], dtype=object), allow_pickle=True)
    return path


def with_attribute(model: nn.Module, value: Any) -> nn.Module:
    model.more = value
    return model


@pytest.fixture(autouse=True)
def _nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "num_made", 0)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", HOSTILE)
def test_nothing_is_run(way: str, is_zip: bool, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    torch.save({"epoch": 1, "x": HOSTILE[way](harm)}, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    assert outcome_of(tmp_path / "a.pth") in ("refused", "read")
    assert not harm.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)  # the way itself is a real one
    assert harm.exists()


def outcome_of(path: Path) -> str:
    try:
        inert.read(path, {})
    except CheckpointError as error:
        return "refused" if "run code" in str(error) or "without running its code" in str(error) else str(error)
    return "read"


RAW = {  # pickles by hand, in opcodes that torch.save does not write
    "protocol 0": lambda text: b"cposix\nsystem\n(V" + text + b"\ntR.",
    "INST": lambda text: b"(V" + text + b"\niposix\nsystem\n.",
    "OBJ": lambda text: b"(cposix\nsystem\nV" + text + b"\no.",
    "STACK_GLOBAL": lambda text: b"\x80\x04\x8c\x05posix\x8c\x06system\x93X" + len(text).to_bytes(4, "little") + text + b"\x85R.",
    "dotted name": lambda text: b"\x80\x04\x8c\x02os\x8c\x06system\x93X" + len(text).to_bytes(4, "little") + text + b"\x85R.",
    "name of Python 2": lambda text: b"\x80\x02c__builtin__\neval\nX" + evaluated(text) + b"\x85R.",
}  # fmt: skip


def evaluated(text: bytes) -> bytes:
    code = f"__import__('os').system({text.decode()!r})".encode()
    return len(code).to_bytes(4, "little") + code


def with_pickle(path: Path, content: bytes) -> None:
    """A file in torch's zip format with this pickle in it."""
    torch.save({"a": 1}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, content if name.endswith("/data.pkl") else part)


@pytest.mark.skipif(os.name != "posix", reason="the module is called posix")
@pytest.mark.parametrize("way", RAW)
def test_opcodes_that_torch_does_not_write_run_nothing(way: str, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    content = RAW[way](command(harm).encode())
    with_pickle(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError):
        inert.read(tmp_path / "a.pth", {})
    (tmp_path / "b.pth").write_bytes(content)  # where the format of old has its magic number
    with pytest.raises(CheckpointError):
        inert.read(tmp_path / "b.pth", {})
    assert not harm.exists()
    pickle.loads(content)
    assert harm.exists()


@pytest.mark.parametrize(
    "name", ["collections.OrderedDict", "collections.deque", "numpy.dtype", "torch_frame.trainer.MetricStorage"]
)
def test_an_allowed_name_gives_no_way_to_others(name: str, tmp_path: Path) -> None:
    """`allowed.attribute` is another name, and there is no looking up of attributes."""
    module, _, last = name.rpartition(".")
    for behind in ("__init__.__globals__", "__class__.__base__", "__reduce__"):
        content = f"\x80\x02c{module}\n{last}.{behind}\n)R.".encode("latin-1")
        with_pickle(tmp_path / "a.pth", content)
        made = inert.read(tmp_path / "a.pth", {"torch_frame.trainer.MetricStorage": OrderedDict})
        assert isinstance(made, inert.LeftOut)


def test_what_runs_code_is_named(tmp_path: Path) -> None:
    torch.save([Calls(os.system, "true"), Calls(eval, "1")], tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=rf"asks for builtins\.eval, {os.system.__module__}\.system .*made to run code"
    ):
        inert.read(tmp_path / "a.pth", {})


def test_what_the_process_allows_is_not_allowed_here_and_stays_allowed(tmp_path: Path) -> None:
    torch.save(Counted(), tmp_path / "a.pth")
    with torch.serialization.safe_globals([Counted, (builtins.eval, "somewhere.eval")]):
        before = torch.serialization.get_safe_globals()
        made = inert.read(tmp_path / "a.pth", {})
        assert set(torch.serialization.get_safe_globals()) == set(before)
    assert isinstance(made, inert.LeftOut)
    assert Counted.num_made == 0


def test_the_list_is_as_before_after_an_error(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    with_pickle(tmp_path / "a.pth", b"\x80\x02ccollections\ndeque\n.")  # a function alone can be read
    inert.read(tmp_path / "a.pth", {})
    with_pickle(tmp_path / "a.pth", b"\x80\x02ccollections\ndeque\n0.")
    with pytest.raises(CheckpointError):
        inert.read(tmp_path / "a.pth", {})
    assert set(torch.serialization.get_safe_globals()) == set(before)


CONTENT = {
    "tensors": {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(1, dtype=torch.int64), "h": torch.ones(2).half()},
    "plain": [None, True, -1, 2.5, "a b", b"bytes", (1, (2,)), 1 + 2j, {1, 2}],
    "deques": [deque([1, 2, 3], maxlen=5), deque(maxlen=1), deque([deque([1])])],
    "dicts": [defaultdict(list, {"a": [1]}), OrderedDict(a=1), Counter("aab"), {(1, 2): {}}],
}  # fmt: skip


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_plain_content_comes_as_it_is(is_zip: bool, tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    read = inert.read(tmp_path / "a.pth", {})
    assert differences(read, CONTENT) == []
    assert [d.maxlen for d in read["deques"]] == [5, 1, None]


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.1),
        np.float32(0.1),
        np.int64(-3),
        np.uint8(200),
        np.bool_(True),
        np.complex128(1 + 2j),
        np.dtype(">f4").type(2.5),
    ],
    ids=repr,
)
def test_numpy_scalars_come_as_numbers(value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    read = inert.read(tmp_path / "a.pth", {})
    assert read == value
    assert type(read) is type(value.item())


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.zeros((0, 2), dtype=np.float16),
        np.array(True),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)
def test_numpy_arrays_come_as_arrays(array: np.ndarray[Any, Any], tmp_path: Path) -> None:
    torch.save({"array": array}, tmp_path / "a.pth")
    read = inert.read(tmp_path / "a.pth", {})["array"]
    np.testing.assert_array_equal(read, array)
    assert (read.dtype, read.shape) == (array.dtype, array.shape)


def test_numpy_1_has_other_names_for_the_same(tmp_path: Path) -> None:
    torch.save([np.float64(0.1), np.arange(3)], tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        content = archive.read("a/data.pkl")
    assert b"numpy._core.multiarray" in content
    with_pickle(tmp_path / "a.pth", content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    number, array = inert.read(tmp_path / "a.pth", {})
    assert number == 0.1
    assert array.tolist() == [0, 1, 2]


def test_objects_of_known_classes_keep_their_attributes(tmp_path: Path) -> None:
    value = Counted()
    value.value = deque([1], maxlen=2)
    torch.save([value, value], tmp_path / "a.pth")
    one, other = inert.read(tmp_path / "a.pth", {f"{Counted.__module__}.Counted": inert.Record})
    assert one is other
    assert vars(one) == {"value": deque([1])}
    assert Counted.num_made == 0


def test_what_holds_itself_is_read(tmp_path: Path) -> None:
    value: dict[str, Any] = {"list": []}
    value["list"].append(value)
    torch.save(value, tmp_path / "a.pth")
    read = inert.read(tmp_path / "a.pth", {})
    assert read["list"][0] is read


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for content in (
        b"",
        b"x",
        b"\x80\x02",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        bytes(1000),
        b"PK\x03\x04" + bytes(99),
    ):
        (tmp_path / "b.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"b\.pth cannot be read: it is damaged, or no checkpoint"):
            inert.read(tmp_path / "b.pth", {})


def test_no_file_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*a\.pth"):
        inert.read(tmp_path / "a.pth", {})
    with pytest.raises(CheckpointError, match="cannot be read"):
        inert.read(tmp_path, {})
