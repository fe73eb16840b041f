"""Batches of any nesting reach the device with their types; "meta" stands in for a second device."""

from __future__ import annotations

import traceback
from collections import ChainMap, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import FrozenInstanceError, dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from torch_frame.data.move import leaves, move_to_device, resolve_device

CPU = torch.device("cpu")
META = torch.device("meta")


class Point(NamedTuple):
    x: Any
    y: Any = 0


Pair = namedtuple("Pair", ["first", "second"])


class NamedPair(Pair):
    """A namedtuple's subclass, without __slots__."""


@dataclass
class Sample:
    image: Any
    name: str = "a"
    cached: Any = field(init=False, default=None)
    unset: Any = field(init=False)


@dataclass(frozen=True)
class FrozenSample:
    image: Any

    def __post_init__(self) -> None:
        assert self.image.device == CPU, "made again through __init__"


@dataclass(slots=True)
class SlottedSample:
    image: Any
    count: int = 1


@dataclass(frozen=True, slots=True)
class FrozenSlottedSample:
    image: Any


@dataclass(frozen=True)
class HandSlottedSample:
    __slots__ = ("image",)
    image: Any


class AttributeDict(dict[str, Any]):
    """The idiom that makes `d.key` and `d["key"]` one."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class StrictAttributeDict(dict[str, Any]):
    __getattr__ = dict.__getitem__


class ReadOnlyMapping(Mapping[str, Any]):
    """A constructor of its own kind: can't be made again from a dict."""

    def __init__(self, image: Tensor, name: str) -> None:
        self._items = {"image": image, "name": name}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class SelfMover(UserDict[str, Any]):
    """Changes itself and takes one argument, as transformers' BatchEncoding does."""

    def to(self, device: torch.device) -> SelfMover:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Boxes:
    def __init__(self, boxes: Tensor) -> None:
        self.boxes = boxes

    def to(self, device: torch.device) -> Boxes:
        return Boxes(self.boxes.to(device))


class Broken:
    def to(self, device: torch.device) -> Broken:
        raise LookupError(f"no way to {device}")


def tensor() -> Tensor:
    return torch.zeros(2)


def test_resolve_device_gives_what_tensors_report() -> None:
    assert resolve_device("cpu:0") == torch.empty(0).device
    assert resolve_device(META) == torch.empty(0, device="meta").device


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_cuda_device_that_is_not_there_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"device is 'cuda', but torch .* sees no CUDA device\. Pass device='cpu'"):
        resolve_device("cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_without_an_index_is_the_current_one() -> None:
    device = resolve_device("cuda")
    assert device == torch.device("cuda", torch.cuda.current_device())
    there = torch.zeros(2, device="cuda")
    assert move_to_device(there, device) is there
    assert move_to_device(there, torch.device("cuda")) is there


@pytest.mark.parametrize(
    "batch",
    [
        tensor(),
        [tensor(), 1],
        (tensor(), "a"),
        {"a": tensor()},
        Point(tensor()),
        OrderedDict(a=tensor()),
        UserDict(a=tensor()),
        Sample(tensor()),
        FrozenSlottedSample(tensor()),
        ReadOnlyMapping(tensor(), "a"),
        pack_sequence([tensor()]),
        [],
        (),
        {},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_what_is_there_already_comes_back_as_the_same_object(batch: Any) -> None:
    assert move_to_device(batch, CPU) is batch


@pytest.mark.parametrize(
    "leaf",
    ["text", b"bytes", 1, 2.5, True, None, np.ones(3), np.float32(1), Tensor, Sample, torch.float32, CPU, {1, 2}, len],
    ids=repr,
)
def test_everything_else_is_left_alone(leaf: Any) -> None:
    assert move_to_device(leaf, META) is leaf
    assert move_to_device([tensor(), leaf], META)[1] is leaf


@pytest.mark.parametrize(
    "batch",
    [
        [tensor()],
        (tensor(),),
        {"image": tensor()},
        Point(tensor()),
        NamedPair(tensor(), 1),
        OrderedDict(image=tensor()),
        UserDict(image=tensor()),
        MappingProxyType({"image": tensor()}),
        ChainMap({"image": tensor()}, {"name": "a"}),
        AttributeDict(image=tensor()),
        StrictAttributeDict(image=tensor()),
        Sample(tensor()),
        FrozenSample(tensor()),
        SlottedSample(tensor()),
        FrozenSlottedSample(tensor()),
        HandSlottedSample(tensor()),
        pack_sequence([tensor()]),
        torch.ones(3, 3).topk(1),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_a_container_keeps_its_type_and_the_users_is_not_changed(batch: Any) -> None:
    before = list(map(id, leaves(batch)))
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert moved is not batch
    assert any(isinstance(leaf, Tensor) and leaf.device == META for leaf in leaves(moved))
    assert list(map(id, leaves(batch))) == before
    assert all(leaf.device == CPU for leaf in leaves(batch) if isinstance(leaf, Tensor))


def test_a_namedtuple_keeps_its_fields() -> None:
    moved = move_to_device(Point(tensor(), y="b"), META)
    assert moved.x.device == META
    assert moved.y == "b"


def test_a_subclass_keeps_its_attributes() -> None:
    pair = NamedPair(tensor(), 1)
    pair.path = "a.png"  # type: ignore[attr-defined]
    assert move_to_device(pair, META).path == "a.png"  # type: ignore[attr-defined]

    class Images(list[Tensor]):
        path = ""

    images = Images([tensor()])
    images.path = "a.png"
    moved = move_to_device(images, META)
    assert type(moved) is Images
    assert moved.path == "a.png"
    assert moved[0].device == META


def test_a_defaultdict_keeps_its_factory() -> None:
    moved = move_to_device(defaultdict(list, a=tensor()), META)
    assert moved["a"].device == META  # type: ignore[attr-defined]
    assert moved["new"] == []


def test_an_ordered_dict_keeps_its_order() -> None:
    batch = OrderedDict(b=tensor(), a=1, c=tensor())
    batch.move_to_end("b")
    assert list(move_to_device(batch, META)) == ["a", "c", "b"]


def test_an_attribute_dict_moves_its_attributes_too() -> None:
    batch = AttributeDict(image=tensor())
    moved = move_to_device(batch, META)
    assert moved.image.device == moved["image"].device == META
    assert batch.image.device == CPU


def test_a_mapping_that_cannot_be_made_again_becomes_a_dict() -> None:
    batch = ReadOnlyMapping(tensor(), "a")
    moved: Any = move_to_device(batch, META)
    assert type(moved) is dict
    assert (moved["image"].device, moved["name"]) == (META, "a")
    assert batch["image"].device == CPU


def test_a_dict_that_refuses_items_becomes_a_dict() -> None:
    class Locked(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            raise TypeError("locked")

    assert type(move_to_device(Locked(a=tensor()), META)) is dict


def test_a_dataclass_moves_its_fields_whether_or_not_init_takes_them() -> None:
    sample = Sample(tensor())
    sample.cached = [tensor()]
    sample.path = "a.png"  # type: ignore[attr-defined]
    moved = move_to_device(sample, META)
    assert moved.image.device == moved.cached[0].device == META
    assert (moved.name, moved.path) == ("a", "a.png")  # type: ignore[attr-defined]
    assert not hasattr(moved, "unset")
    assert sample.cached[0].device == CPU


def test_a_frozen_dataclass_stays_frozen() -> None:
    moved = move_to_device(FrozenSample(tensor()), META)
    with pytest.raises(FrozenInstanceError):
        moved.image = 1  # type: ignore[misc]


def test_a_packed_sequence_moves_with_its_indices() -> None:
    batch = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
    moved = move_to_device({"text": batch}, META)["text"]
    assert isinstance(moved, PackedSequence)
    assert moved.sorted_indices is not None
    assert moved.data.device == moved.sorted_indices.device == META
    assert moved.batch_sizes.device == CPU  # where torch wants it


def test_an_object_with_a_to_is_sent_by_its_own() -> None:
    boxes = Boxes(tensor())
    assert move_to_device([boxes], META)[0].boxes.device == META
    assert boxes.boxes.device == CPU


def test_an_object_that_changes_itself_is_the_same_object() -> None:
    encoding = SelfMover(ids=tensor())
    batch = [encoding]
    assert move_to_device(batch, META) is batch
    assert encoding["ids"].device == META


def test_a_key_or_field_that_is_named_to_is_no_method() -> None:
    @dataclass
    class Mail:
        to: str
        body: Tensor

    assert move_to_device(Mail("bob", tensor()), META).body.device == META
    assert move_to_device(AttributeDict(to=len, body=tensor()), META)["body"].device == META


def test_an_error_in_the_users_to_surfaces_with_its_traceback() -> None:
    with pytest.raises(LookupError, match="no way to meta") as caught:
        move_to_device({"a": [Broken()]}, META)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].line == 'raise LookupError(f"no way to {device}")'


def test_a_circle_ends() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(RecursionError):
        move_to_device(circle, CPU)


def test_an_embedded_parameter_and_gradients_survive() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    assert move_to_device([weight], CPU)[0] is weight
    assert move_to_device([weight], META)[0].requires_grad


def test_leaves_sees_into_what_others_built_on_containers_but_not_into_objects() -> None:
    first, second, boxes = tensor(), tensor(), Boxes(tensor())
    found = list(leaves([SelfMover(ids=first), pack_sequence([second]), boxes, Sample(1)]))
    assert found[0] is first
    assert torch.equal(found[1], second)
    assert any(leaf is boxes for leaf in found)
    assert found[-3:] == [1, "a", None]


def test_leaves_does_not_see_into_a_container_with_a_to() -> None:
    class Instances(dict[str, Tensor]):
        def to(self, device: torch.device) -> Instances:
            return Instances({key: value.to(device) for key, value in self.items()})

    instances = Instances(boxes=tensor())
    assert next(leaves(instances)) is instances


scalars = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.builds(np.ones, st.just(2)))
tensors = st.builds(torch.zeros, st.lists(st.integers(0, 2), max_size=2))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keyed = st.dictionaries(st.text(max_size=3), children, max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        keyed,
        keyed.map(OrderedDict),
        keyed.map(UserDict),
        keyed.map(lambda items: defaultdict(int, items)),
        st.builds(Point, children, children),
        st.builds(Sample, children),
        st.builds(FrozenSlottedSample, children),
    )


batches = st.recursive(scalars | tensors, containers, max_leaves=12)


def same_shape(moved: Any, batch: Any) -> bool:
    """Same types all the way down, same non-tensors, shapes and dtypes."""
    if isinstance(batch, Tensor):
        return moved.device == META and moved.shape == batch.shape and moved.dtype == batch.dtype
    if type(moved) is not type(batch):
        return False
    if isinstance(batch, Sample | FrozenSlottedSample):
        return same_shape(moved.image, batch.image)
    if isinstance(batch, Mapping):
        return list(moved) == list(batch) and all(same_shape(moved[key], batch[key]) for key in batch)
    if isinstance(batch, list | tuple):
        return len(moved) == len(batch) and all(map(same_shape, moved, batch))
    return moved is batch


@given(batches)
def test_any_nesting_keeps_its_structure_and_moves_each_tensor(batch: Any) -> None:
    before = list(leaves(batch))
    moved = move_to_device(batch, META)
    assert same_shape(moved, batch)
    assert all(old is now for old, now in zip(before, leaves(batch), strict=True))
    if not any(isinstance(leaf, Tensor) for leaf in before):
        assert moved is batch


@given(batches)
def test_any_nesting_that_is_there_already_is_the_same_object(batch: Any) -> None:
    assert move_to_device(batch, CPU) is batch
