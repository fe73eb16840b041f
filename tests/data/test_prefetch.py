"""What is fetched when, what surfaces when, and what is let go."""

from __future__ import annotations

import gc
import multiprocessing
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_frame.data.move import resolve_device
from torch_frame.data.prefetch import _is_plain_host_data, _one_ahead, has_streams, prefetch_to_device

CPU = torch.device("cpu")
META = torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Log(list[str]):
    """Writes down what happens, and plays loader, copy and hand-over."""

    def loader(self, num_batches: int, fail_at: int | None = None) -> Iterator[int]:
        try:
            for index in range(num_batches):
                self.append(f"fetch {index}")
                if index == fail_at:
                    raise OSError(f"batch {index} is broken")
                yield index
        finally:
            self.append("released")

    def copy(self, batch: int) -> int:
        self.append(f"copy {batch}")
        return batch

    def hand_over(self, batch: int) -> None:
        self.append(f"hand over {batch}")

    def ahead(self, *args: Any) -> Iterator[int]:
        return _one_ahead(self.loader(*args), self.copy, self.hand_over)


def nothing(batch: Any) -> None:
    """No hand-over."""


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(index * index))


def test_the_next_batch_is_on_its_way_while_one_trains() -> None:
    log = Log()
    for batch in log.ahead(3):
        log.append(f"train {batch}")
    assert log == [
        *("fetch 0", "copy 0", "hand over 0"),
        *("fetch 1", "copy 1", "train 0", "hand over 1"),
        *("fetch 2", "copy 2", "train 1", "hand over 2"),
        *("released", "train 2"),
    ]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_error_surfaces_when_its_batch_is_asked_for(fail_at: int) -> None:
    batches = Log().ahead(3, fail_at)
    assert [next(batches) for _ in range(fail_at)] == list(range(fail_at))
    with pytest.raises(OSError, match=f"batch {fail_at} is broken") as caught:
        next(batches)
    assert caught.traceback[-1].name == "loader"
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_in_the_copy_waits_for_its_batch_too() -> None:
    def copy(batch: int) -> int:
        return 1 // (1 - batch)

    batches = _one_ahead([0, 1], copy, nothing)
    assert next(batches) == 1
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_keyboard_interrupt_does_not_wait() -> None:
    def loader() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(_one_ahead(loader(), int, nothing))


def test_a_raised_error_leaves_no_circle_behind() -> None:
    class Thing:
        pass

    def run() -> weakref.ref[Thing]:
        thing = Thing()

        def loader() -> Iterator[int]:
            yield 0
            raise OSError(thing)

        try:  # pytest.raises would hold the error in a circle of its own
            list(_one_ahead(loader(), int, nothing))
        except OSError:
            return weakref.ref(thing)
        raise AssertionError("the error did not surface")

    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


def test_breaking_off_releases_the_loader_at_once() -> None:
    log = Log()
    for _ in log.ahead(3):
        break
    assert log[-1] == "released"


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_breaking_off_elsewhere_releases_the_loader_at_once(device: torch.device) -> None:
    log = Log()
    for _ in prefetch_to_device(log.loader(3), device):
        break
    assert log == ["fetch 0", "released"]


def test_breaking_off_ends_the_loaders_workers() -> None:
    before = len(multiprocessing.active_children())
    batches = prefetch_to_device(DataLoader(Squares(), batch_size=4, num_workers=1), CPU)
    assert next(batches).tolist() == [0, 1, 4, 9]
    assert len(multiprocessing.active_children()) == before + 1
    del batches
    assert len(multiprocessing.active_children()) == before


def test_nothing_keeps_a_batch_alive() -> None:
    references: list[weakref.ref[Tensor]] = []

    def loader() -> Iterator[Tensor]:
        for index in range(3):
            batch = torch.full((2,), index)
            references.append(weakref.ref(batch))
            yield batch
            del batch

    def check(batches: Iterator[Tensor], num_held: int) -> None:
        references.clear()
        for batch in batches:
            del batch
            assert sum(reference() is not None for reference in references) <= num_held
        assert [reference() for reference in references] == [None] * 3

    check(prefetch_to_device(loader(), CPU), num_held=1)
    check(_one_ahead(loader(), lambda batch: batch, nothing), num_held=1)  # the one ahead


def test_batches_arrive_on_the_device_in_order_and_not_ahead() -> None:
    log = Log()
    batches = prefetch_to_device(((torch.tensor(index), "name") for index in log.loader(2)), META)
    number, name = next(batches)
    assert (number.device, name) == (META, "name")
    assert log == ["fetch 0"]


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batches_give_none(batches: Any) -> None:
    assert list(prefetch_to_device(batches, CPU)) == []
    assert list(_one_ahead(batches, int, nothing)) == []


@given(st.lists(st.one_of(st.none(), st.integers()), max_size=6))
def test_one_ahead_yields_what_the_loader_yields(batches: list[int | None]) -> None:
    assert list(_one_ahead(batches, lambda batch: batch, nothing)) == batches


def test_only_plain_host_tensors_and_numbers_need_no_order_between_streams() -> None:
    class Custom:
        def to(self, device: torch.device) -> Custom:
            return self

    plain = [torch.zeros(2), 1, "a", None, Tensor, Custom]
    other = [torch.nn.Parameter(torch.zeros(2)), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), Custom()]
    assert all(map(_is_plain_host_data, plain))
    assert not any(map(_is_plain_host_data, other))


@pytest.mark.parametrize(("device", "gives"), [("cpu", False), ("meta", False), ("mps", False), ("cuda:0", True)])
def test_which_devices_are_copied_to_ahead(device: str, gives: bool) -> None:
    assert has_streams(torch.device(device)) is gives


@pytest.mark.parametrize("kind", ["xpu", "hpu", "mtia", "privateuseone"])
def test_a_device_that_torch_does_not_have_is_not_copied_to_ahead(kind: str) -> None:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == kind:
        pytest.skip("this machine has one")
    assert not has_streams(torch.device(kind))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
def test_cuda_batches_are_right_while_the_gpu_is_behind(pin: bool) -> None:
    """Batches are freed while a slow kernel still has to read them: the next copy must not get their memory."""
    device = resolve_device("cuda")
    host = [torch.full((1 << 20,), float(index)) for index in range(12)]
    if pin:
        host = [batch.pin_memory() for batch in host]
    sums = []
    for batch in prefetch_to_device(({"x": batch} for batch in host), device):
        torch.cuda._sleep(20_000_000)
        sums.append(batch["x"].double().sum())
        del batch
    assert [value.item() / (1 << 20) for value in sums] == list(range(12))


@pytest.mark.cuda
@needs_cuda
def test_cuda_objects_that_cannot_be_seen_into_are_right_too() -> None:
    class Opaque:
        def __init__(self, data: Tensor) -> None:
            self.data = data

        def to(self, device: torch.device) -> Opaque:
            return Opaque(self.data.to(device, non_blocking=True) + 1)

    def loader() -> Iterator[Opaque]:
        for index in range(12):
            yield Opaque(torch.full((1 << 20,), float(index)).pin_memory())

    sums = []
    for batch in prefetch_to_device(loader(), resolve_device("cuda")):
        torch.cuda._sleep(20_000_000)
        sums.append(batch.data.double().sum())
        del batch
    assert [value.item() / (1 << 20) for value in sums] == [index + 1 for index in range(12)]


@pytest.mark.cuda
@needs_cuda
def test_cuda_data_made_on_the_gpu_is_waited_for() -> None:
    class Doubled:
        def __init__(self, data: Tensor) -> None:
            self.data = data

        def to(self, device: torch.device) -> Doubled:
            return Doubled(self.data * 2)

    def loader() -> Iterator[Doubled]:
        for index in range(6):
            data = torch.zeros(1 << 20, device="cuda")
            torch.cuda._sleep(20_000_000)
            yield Doubled(data + index)

    batches = prefetch_to_device(loader(), resolve_device("cuda"))
    assert [batch.data.mean().item() for batch in batches] == [2 * index for index in range(6)]


@pytest.mark.cuda
@needs_cuda
def test_cuda_errors_wait_for_their_batch() -> None:
    batches = prefetch_to_device(map(torch.tensor, Log().loader(3, 1)), resolve_device("cuda"))
    assert next(batches).item() == 0
    with pytest.raises(OSError, match="batch 1 is broken"):
        next(batches)
