"""MetricStorage: 1.7's surface, nothing is read before it is asked for, nothing grows."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_frame import HistoryBuffer, MetricStorage
from torch_frame.tracking.storage import ROWS_KEPT_UNREAD

FLOATS = st.floats(-1e6, 1e6, allow_nan=False, width=32)


class DeviceLike(Tensor):
    """Counts the reads that a value on a GPU would wait for."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
            DeviceLike.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def device_like(value: float) -> Tensor:
    return torch.tensor(value).as_subclass(DeviceLike)


@pytest.fixture(autouse=True)
def _no_reads_yet() -> None:
    DeviceLike.reads = 0


# ---------------------------------------------------------------- MetricStorage: 1.7's surface


def test_names_are_keys_of_a_dict_of_buffers() -> None:
    storage = MetricStorage()
    storage.update(iter=0, loss=0.5, acc=torch.tensor(0.25))
    assert isinstance(storage, dict)
    assert list(storage) == ["loss", "acc"]
    assert all(isinstance(buffer, HistoryBuffer) for buffer in storage.values())
    assert "loss" in storage
    assert "other" not in storage
    assert storage["acc"].latest == 0.25
    with pytest.raises(KeyError):
        storage["other"]


def test_values_maybe_smooth_are_means_or_the_latest_as_logged() -> None:
    storage = MetricStorage(default_win_size=2)
    for i, value in enumerate((1.0, 2.0, 4.0)):
        storage.update(iter=i * 10, loss=value)
        storage.update(iter=i, smooth=False, lr=value)
    assert storage.values_maybe_smooth == {"loss": (20, 3.0), "lr": (2, 4.0)}


def test_a_name_without_iter_counts_from_0() -> None:
    storage = MetricStorage()
    for n in range(3):
        storage.update(loss=1.0)
        assert storage.values_maybe_smooth["loss"][0] == n


def test_each_name_may_have_its_own_window() -> None:
    storage = MetricStorage(default_win_size=3)
    for i in range(4):
        storage.update(iter=i, loss=float(i))
        storage.update(iter=i, window_size=1, acc=float(i))
    assert storage["loss"].avg == 2.0
    assert storage["acc"].avg == 3.0


@pytest.mark.parametrize("first", [True, False])
def test_a_name_is_logged_smooth_or_not_but_not_both(first: bool) -> None:
    storage = MetricStorage()
    storage.update(iter=0, smooth=first, loss=1.0)
    with pytest.raises(ValueError, match=r"'loss'.*smooth"):
        storage.update(iter=1, smooth=not first, loss=1.0)
    assert storage.values_maybe_smooth == {"loss": (0, 1.0)}


@pytest.mark.parametrize("again", [0, 4, 5])
@pytest.mark.parametrize("way", ["update", "record", "record_before_others"])
def test_two_values_for_one_iteration_are_told(way: str, again: int) -> None:
    """Also where the first one has not been read yet, and where later steps brought other names."""
    storage = MetricStorage()
    if way == "update":
        storage.update(iter=5, loss=1.0)
    else:
        storage.record(5, {"loss": device_like(1.0)})
    if way == "record_before_others":
        storage.record(6, {"other": device_like(1.0)})
    with pytest.raises(ValueError, match=r"'loss'.*\b5\b"):
        storage.update(iter=again, loss=2.0)
    storage.update(iter=6, loss=3.0)
    assert storage.values_maybe_smooth["loss"] == (6, 2.0)


def test_a_step_may_bring_other_names_than_the_one_before() -> None:
    storage = MetricStorage()
    storage.record(0, {"loss": 1.0})
    storage.record(1, {"loss": 2.0, "norm": 5.0})
    storage.record(2, {"loss": 3.0})
    assert storage.values_maybe_smooth == {"loss": (2, 2.0), "norm": (1, 5.0)}
    assert storage.latest_iters() == {"loss": 2, "norm": 1}


def test_a_declared_name_is_read_as_declared() -> None:
    storage = MetricStorage()
    storage.declare("lr", smooth=False)
    storage.record(0, {"lr": 1.0})
    storage.record(1, {"lr": 3.0})
    assert storage.values_maybe_smooth == {"lr": (1, 3.0)}


def test_a_declared_name_stays_declared_when_a_state_is_restored() -> None:
    storage = MetricStorage()
    storage.declare("lr", smooth=False)
    storage.load_state_dict(MetricStorage().state_dict())  # of a run saved before its first step
    storage.record(0, {"lr": 1.0})
    storage.record(1, {"lr": 3.0})
    assert storage.values_maybe_smooth == {"lr": (1, 3.0)}


# ---------------------------------------------------------------- nothing is read before it is asked for


def rows(num: int, first: int = 0) -> list[dict[str, Tensor | float]]:
    return [
        {"loss": device_like(float(i)), "part": device_like(i / 2), "time": 0.25} for i in range(first, first + num)
    ]


def record(storage: MetricStorage, rows: list[Any], first: int = 0) -> None:
    for i, row in enumerate(rows, start=first):
        storage.record(i, row)


def test_values_may_come_in_another_order_in_each_step() -> None:
    storage = MetricStorage()
    record(
        storage, [{"a": 1.0, "b": 10.0}, {"b": 20.0, "a": 2.0}, {"c": 5.0, "b": 30.0}, {"b": 40.0, "c": 6.0, "a": 4.0}]
    )
    assert {name: storage[name].global_sum for name in storage} == {"a": 7.0, "b": 100.0, "c": 11.0}
    assert storage.latest_iters() == {"a": 3, "b": 3, "c": 3}


def test_recording_reads_nothing() -> None:
    storage = MetricStorage()
    record(storage, rows(ROWS_KEPT_UNREAD - 1))
    assert DeviceLike.reads == 0
    assert list(storage) == ["loss", "part", "time"]
    assert "loss" in storage
    assert DeviceLike.reads == 0


LOOKS: dict[str, Any] = {
    "latest": lambda storage: storage["loss"].latest,
    "avg": lambda storage: storage["loss"].avg,
    "global_avg": lambda storage: storage["part"].global_avg,
    "global_sum": lambda storage: storage["time"].global_sum,
    "comparison": lambda storage: storage["loss"] > 3,
    "str": lambda storage: str(storage["loss"]),
    "float": lambda storage: float(storage["loss"]),
    "values_maybe_smooth": lambda storage: storage.values_maybe_smooth,
    "latest_iters": lambda storage: storage.latest_iters(),
    "state_dict": lambda storage: storage.state_dict(),
    "flush": lambda storage: storage.flush(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_reads_all_that_waits_in_one_transfer(look: Any) -> None:
    storage = MetricStorage()
    record(storage, rows(20))
    look(storage)
    assert DeviceLike.reads == 1
    for other in LOOKS.values():
        other(storage)
    assert DeviceLike.reads == 1
    assert storage["loss"].latest == 19.0


def test_a_long_run_is_read_now_and_then() -> None:
    storage = MetricStorage()
    record(storage, rows(10 * ROWS_KEPT_UNREAD))
    assert DeviceLike.reads == 10


def test_values_of_several_kinds_take_one_transfer_each() -> None:
    storage = MetricStorage()
    for i in range(20):
        whole = torch.tensor(i).as_subclass(DeviceLike)
        storage.record(i, {"loss": device_like(i + 0.5), "hits": whole, "one": device_like(1.0).reshape(1)})
    assert storage.values_maybe_smooth == {"loss": (19, 10.0), "hits": (19, 9.5), "one": (19, 1.0)}
    assert DeviceLike.reads == 2


def test_a_look_in_between_does_not_change_what_is_kept() -> None:
    looked_at, unread = MetricStorage(), MetricStorage()
    for i, row in enumerate(rows(3 * ROWS_KEPT_UNREAD + 7)):
        looked_at.record(i, row)
        looked_at["loss"].latest  # noqa: B018
        unread.record(i, row)
    assert looked_at.state_dict() == unread.state_dict()


def test_on_read_sees_each_value_once_with_its_iteration() -> None:
    storage = MetricStorage()
    seen: list[tuple[int, float]] = []

    def on_read(columns: Mapping[str, tuple[list[int], list[float]]]) -> None:
        iters, values = columns["loss"]
        seen.extend(zip(iters, values, strict=True))

    storage.on_read = on_read
    record(storage, rows(ROWS_KEPT_UNREAD + 5))
    storage.flush()
    storage.flush()
    assert seen == [(i, float(i)) for i in range(ROWS_KEPT_UNREAD + 5)]


def test_values_that_only_some_steps_have_are_read_with_their_iterations() -> None:
    storage = MetricStorage()
    seen: dict[str, tuple[list[int], list[float]]] = {}
    storage.on_read = seen.update
    for i in range(6):
        storage.record(i, {"loss": float(i), **({"grad_norm": 10.0 * i} if i % 3 == 2 else {})})
    storage.flush()
    assert seen["grad_norm"] == ([2, 5], [20.0, 50.0])
    assert storage["loss"].global_sum == 15.0
    assert storage.latest_iters() == {"loss": 5, "grad_norm": 5}


def test_an_error_on_reading_loses_no_value() -> None:
    storage = MetricStorage()

    def refuse(*args: Any) -> None:
        raise FloatingPointError

    storage.on_read = refuse
    record(storage, rows(3))
    with pytest.raises(FloatingPointError):
        storage.flush()
    assert storage["loss"].latest == 2.0
    assert storage["loss"].global_sum == 3.0


# ---------------------------------------------------------------- nothing grows


def size_of(value: Any) -> int:
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(size_of(item) for item in value.values())
    if isinstance(value, list):
        return sys.getsizeof(value) + sum(size_of(item) for item in value)
    return sys.getsizeof(value)


def test_a_storage_does_not_grow_with_the_run() -> None:
    storage = MetricStorage()
    sizes = []
    for block in range(4):
        for i in range(block * 500, block * 500 + 500):
            storage.record(i, {"loss": device_like(0.5), "time": 0.25})
            storage.update(iter=i, smooth=False, acc=0.5)
        assert len(storage._pending) <= ROWS_KEPT_UNREAD
        sizes.append(size_of(storage.state_dict()))
        assert len(storage.state_dict()["loss"]["window"]) == 20
    assert max(sizes) - min(sizes) <= 64, "a count and a sum may take a few bytes more"


# ---------------------------------------------------------------- state


def filled(num: int = 70) -> MetricStorage:
    storage = MetricStorage(7)
    record(storage, rows(num))
    storage.update(iter=3, smooth=False, window_size=1, acc=0.1)
    return storage


def test_a_state_round_trip_keeps_everything() -> None:
    storage, other = filled(), MetricStorage()
    other.record(0, {"gone": device_like(1.0)})
    other.load_state_dict(storage.state_dict())
    assert other.state_dict() == storage.state_dict()
    assert other.values_maybe_smooth == storage.values_maybe_smooth
    assert "gone" not in other
    for each in (storage, other):
        record(each, rows(30, 70), 70)
        each.update(iter=4, smooth=False, acc=0.2)
    assert other.state_dict() == storage.state_dict()
    with pytest.raises(ValueError, match="acc"):
        other.update(iter=4, smooth=False, acc=0.2)
    with pytest.raises(ValueError, match="smooth"):
        other.update(iter=5, acc=0.2)


def test_a_value_for_a_restored_moment_does_not_take_a_later_ones_place() -> None:
    storage, saved = MetricStorage(), MetricStorage()
    saved.update(iter=0, loss=1.0)
    storage.load_state_dict(saved.state_dict())
    storage.record(1, {"loss": 5.0})
    with pytest.raises(ValueError, match="already has a value for 1"):
        storage.update(iter=0, loss=2.0)
    assert (storage["loss"].global_sum, storage["loss"].latest) == (6.0, 5.0)


def test_a_state_is_of_plain_types_that_later_values_do_not_change() -> None:
    storage = filled()
    state = storage.state_dict()
    before = repr(state)
    record(storage, rows(30, 70), 70)
    storage.flush()
    assert repr(state) == before
    for saved in state.values():
        for value in saved.values():
            assert type(value) in (int, float, bool, list)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_holds_values_that_are_not_finite(bad: float) -> None:
    storage, other = MetricStorage(), MetricStorage()
    storage.record(0, {"loss": bad})
    other.load_state_dict(storage.state_dict())
    assert repr(other["loss"].latest) == repr(bad)


# ---------------------------------------------------------------- against a plain model


class Model:
    """The same, in plain lists."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.values: dict[str, list[float]] = {}
        self.latest: dict[str, int] = {}
        self.restored: set[str] = set()

    def restore(self) -> None:
        self.restored = set(self.values)

    def update(self, iter: int, name: str, value: float) -> bool:
        """Like add; but a value of the moment that a checkpoint was saved in takes the place of the saved one."""
        if name in self.restored and self.latest[name] == iter:
            self.values[name].pop()
            self.latest[name] = -1
        self.restored.discard(name)
        return self.add(iter, {name: value})

    def add(self, iter: int | None, values: Mapping[str, float]) -> bool:
        """Whether it may be added."""
        at = {name: self.latest.get(name, -1) + 1 if iter is None else iter for name in values}
        if any(at[name] <= self.latest.get(name, -1) for name in values):
            return False
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
            self.latest[name] = at[name]
        return True

    def expected(self) -> dict[str, Any]:
        return {
            name: (
                self.latest[name],
                values[-1],
                np.mean(values[-self.window :]),
                sum(values),
                sum(values) / len(values),
            )
            for name, values in self.values.items()
        }


STEP_ROWS = st.dictionaries(st.sampled_from(["loss", "part", "norm"]), FLOATS, min_size=1)
OPERATIONS = st.one_of(
    st.tuples(st.just("record"), STEP_ROWS),
    st.tuples(st.just("record_tensors"), STEP_ROWS),
    st.tuples(st.just("update"), st.tuples(st.integers(0, 80), st.sampled_from(["loss", "acc"]), FLOATS)),
    st.tuples(st.just("count"), st.tuples(st.sampled_from(["norm", "n"]), FLOATS)),
    st.tuples(st.sampled_from(["look", "save"]), st.none()),
)


@given(operations=st.lists(OPERATIONS, max_size=120), window=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_calls_gives_what_plain_lists_give(operations: list[Any], window: int) -> None:
    """Names seen for the first time included; a step's iterations grow, as a trainer's do."""
    storage, model = MetricStorage(window), Model(window)
    step = 100
    for what, argument in operations:
        if what in ("record", "record_tensors"):
            # A hook that counts a step's own name ahead would be told by the step's next record only.
            step = max([step, *model.latest.values()]) + 1
            row = {name: torch.tensor(value) if what == "record_tensors" else value for name, value in argument.items()}
            storage.record(step, row)
            assert model.add(step, argument)
        elif what == "update":
            at, name, value = argument
            if model.update(at, name, value):
                storage.update(iter=at, **{name: value})
            else:
                with pytest.raises(ValueError, match=name):
                    storage.update(iter=at, **{name: value})
        elif what == "count":
            name, value = argument
            model.restored.discard(name)
            model.add(None, {name: value})
            storage.update(**{name: value})
        elif what == "look":
            storage.flush()
        else:
            restored = MetricStorage(window)
            restored.load_state_dict(storage.state_dict())
            storage = restored
            model.restore()
    values = storage.values_maybe_smooth
    assert set(values) == set(storage) == set(model.values)
    for name, (at, latest, mean, total, global_mean) in model.expected().items():
        assert values[name][0] == at
        assert values[name][1] == storage[name].avg == pytest.approx(mean, rel=1e-6, abs=1e-6)
        assert storage[name].latest == latest
        assert storage[name].global_sum == pytest.approx(
            total, rel=1e-9, abs=1e-6
        )  # a value taken back leaves rounding
        assert storage[name].global_avg == pytest.approx(global_mean, rel=1e-9, abs=1e-6)


# ---------------------------------------------------------------- copies


def _through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": _through_torch_save,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_has_the_values_and_follows_the_run_no_more(way: Callable[[Any], Any]) -> None:
    storage = MetricStorage(3)
    storage.declare("lr", smooth=False)
    storage.on_read = lambda columns: None
    for iter in range(5):
        storage.record(iter, {"loss": torch.tensor(float(iter)), "lr": 0.1})
    storage.update(iter=2, acc=0.5, smooth=False, window_size=7)
    copied = way(storage)
    assert type(copied) is MetricStorage
    assert copied.state_dict() == storage.state_dict()
    copied.record(5, {"loss": 9.0, "lr": 0.2})
    copied.update(iter=3, acc=0.75, smooth=False)
    assert (copied["loss"].latest, copied["acc"].latest) == (9.0, 0.75)
    assert (storage["loss"].latest, storage["acc"].latest, storage["loss"].global_sum) == (4.0, 0.5, 10.0)
    with pytest.raises(ValueError, match="already has a value"):
        copied.update(iter=3, acc=0.75, smooth=False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_buffer_is_copied_by_itself(way: Callable[[Any], Any]) -> None:
    storage = MetricStorage()
    storage.record(0, {"loss": torch.tensor(2.0)})
    buffer = way(storage["loss"])
    assert (buffer.latest, buffer.avg) == (2.0, 2.0)
