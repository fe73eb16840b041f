"""Generators are seeded, saved and restored bitwise, through a file and another process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from torch_frame.data.rng import (
    device_states,
    loader_generator_states,
    preserved_rng,
    rng_state,
    seed_all,
    set_device_states,
    set_loader_generator_states,
    set_random_seed,
    set_rng_state,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DRAW = """
import random
import numpy as np
import torch

def draw():
    values = [random.random(), random.gauss(0, 1), random.getrandbits(64)]
    values += [float(np.random.rand()), float(np.random.randn()), int(np.random.randint(1 << 30))]
    values += torch.randn(3).tolist() + torch.randperm(50).tolist()
    if torch.cuda.is_initialized():
        values += torch.randn(3, device="cuda").tolist()
    return values
"""
exec(DRAW)  # the same function here and in the other process


def draws() -> list[Any]:
    values: list[Any] = globals()["draw"]()
    return values


@pytest.fixture(autouse=True)
def _unchanged_globals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    bit_generator = np.random.get_bit_generator()
    with preserved_rng():
        yield
        np.random.set_bit_generator(bit_generator)


def loader_of(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(range(8), **kwargs)  # type: ignore[arg-type]


def test_a_seed_seeds_every_generator_as_by_hand() -> None:
    set_random_seed(7, rank=3)
    ours = draws()
    random.seed(10)
    np.random.seed(10)
    torch.manual_seed(10)
    assert ours == draws()


def test_ranks_draw_different_numbers() -> None:
    set_random_seed(7)
    first = draws()
    set_random_seed(7, rank=1)
    assert not set(first[:6]) & set(draws()[:6])


def test_a_seed_makes_cudnn_deterministic_and_names_the_hash_seed() -> None:
    torch.backends.cudnn.benchmark = True
    set_random_seed(7, 1)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["PYTHONHASHSEED"] == "8"


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.int64(5)])
def test_seeds_to_the_limit_are_fine(seed: int) -> None:
    set_random_seed(seed)
    assert torch.initial_seed() == seed


@pytest.mark.parametrize(("seed", "rank"), [(-1, 0), (0, -1), (2**32, 0), (2**32 - 1, 1), (-1, 1)])
def test_a_seed_out_of_range_gets_a_sentence_and_changes_nothing(seed: int, rank: int) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"0 or more.* we got seed={seed} and rank={rank}"):
        set_random_seed(seed, rank)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_a_seed_that_is_no_integer_gets_a_sentence(seed: Any) -> None:
    with pytest.raises(TypeError, match="have to be integers, but we got seed="):
        set_random_seed(seed)


def test_states_make_a_bitwise_round_trip_through_a_file_and_a_process(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value waiting, and so does numpy's
    np.random.randn()
    torch.randn(3)
    path = tmp_path / "rng.pth"
    torch.save({"rng": rng_state()}, path)
    expected = draws()

    script = f"""{DRAW}
import sys
from torch_frame.data.rng import set_rng_state
if {torch.cuda.is_initialized()}:
    torch.cuda.init()
draw()
set_rng_state(torch.load({str(path)!r}, weights_only=True)["rng"])
print(draw() == eval(sys.stdin.read()))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, input=repr(expected), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_state_is_a_copy_of_its_own() -> None:
    state = rng_state()
    expected = draws()
    for _ in range(2):
        set_rng_state(state)
        assert draws() == expected


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_numpys_other_bit_generators_make_the_round_trip(kind: Any, tmp_path: Path) -> None:
    np.random.set_bit_generator(kind(3))
    np.random.randn()
    torch.save(rng_state(), tmp_path / "rng.pth")
    expected = draws()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert draws() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_state_from_more_cuda_devices_restores_what_fits_and_says_so() -> None:
    state = rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    expected = draws()
    with pytest.warns(UserWarning, match="2 CUDA devices in use, but here there are 0: 0 are restored") as caught:
        set_rng_state(state)
    assert caught[0].filename == __file__
    assert draws() == expected


def test_preserved_rng_leaves_no_trace() -> None:
    set_random_seed(1)
    expected = draws()
    set_random_seed(1)
    with preserved_rng():
        set_random_seed(99)
        draws()
    assert draws() == expected


def test_preserved_rng_restores_after_an_error() -> None:
    set_random_seed(1)
    expected = draws()
    set_random_seed(1)

    def evaluate() -> None:
        draws()
        raise RuntimeError("in evaluation")

    with pytest.raises(RuntimeError, match="in evaluation"), preserved_rng():
        evaluate()
    assert draws() == expected


def test_preserved_rng_starts_from_the_current_state() -> None:
    set_random_seed(1)
    expected = draws()
    set_random_seed(1)
    with preserved_rng():
        assert draws() == expected


def test_nothing_here_starts_cuda() -> None:
    script = """
import torch
from torch_frame.data.rng import *
set_random_seed(1)
with preserved_rng():
    set_rng_state(rng_state())
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_loaders_generator_resumes_its_order() -> None:
    loader = loader_of(shuffle=True, generator=torch.Generator().manual_seed(3))
    list(loader)
    states = loader_generator_states(loader)
    expected = [list(loader), list(loader)]

    resumed = loader_of(shuffle=True, generator=torch.Generator().manual_seed(4))
    set_loader_generator_states(resumed, states)
    assert [list(resumed), list(resumed)] == expected


def generators_everywhere() -> DataLoader[Any]:
    sampler = RandomSampler(range(8), generator=torch.Generator().manual_seed(1))
    batch_sampler = BatchSampler(sampler, batch_size=2, drop_last=False)
    batch_sampler.generator = torch.Generator().manual_seed(2)  # type: ignore[attr-defined]
    return loader_of(batch_sampler=batch_sampler, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("loader", "places"),
    [
        (loader_of(), []),
        (loader_of(shuffle=True), []),
        (loader_of(batch_size=None, generator=torch.Generator()), ["generator"]),
        (loader_of(shuffle=True, generator=torch.Generator()), ["generator"]),
        (loader_of(sampler=RandomSampler(range(8), generator=torch.Generator())), ["sampler.generator"]),
        (generators_everywhere(), ["generator", "batch_sampler.generator", "batch_sampler.sampler.generator"]),
        ([1, 2], []),
        (None, []),
    ],
    ids=["none", "global", "no batches", "shared", "sampler", "everywhere", "list", "None"],
)
def test_each_generator_is_found_once(loader: Any, places: list[str]) -> None:
    assert list(loader_generator_states(loader)) == places


def test_generators_in_every_place_make_the_round_trip(tmp_path: Path) -> None:
    loader = generators_everywhere()
    torch.save(loader_generator_states(loader), tmp_path / "loader.pth")
    before = torch.load(tmp_path / "loader.pth", weights_only=True)
    expected = list(loader)
    torch.rand(2, generator=loader.generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_loader_generator_states(loader, before)
    after = loader_generator_states(loader)
    assert all(torch.equal(after[place], state) for place, state in before.items())
    assert str(list(loader)) == str(expected)


def test_a_loader_that_was_built_otherwise_restores_what_fits_and_says_so() -> None:
    states = loader_generator_states(generators_everywhere())
    loader = loader_of(shuffle=True, generator=torch.Generator())
    with pytest.warns(UserWarning, match=r"at \['generator'\], but the saved one had them at \['batch_sampler"):
        set_loader_generator_states(loader, states)
    assert torch.equal(loader.generator.get_state(), states["generator"])


def test_no_generators_and_no_states_are_nothing_to_say() -> None:
    set_loader_generator_states([1, 2], {})


@pytest.mark.cuda
@needs_cuda
def test_a_seed_that_waits_for_cuda_is_taken() -> None:
    script = """
import torch
from torch_frame.data.rng import set_random_seed
set_random_seed(5)
assert not torch.cuda.is_initialized()
waited = torch.rand(3, device="cuda")
torch.cuda.manual_seed(5)
assert torch.equal(waited, torch.rand(3, device="cuda"))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.cuda
@needs_cuda
def test_cuda_generators_make_the_round_trip(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    torch.save(rng_state(), tmp_path / "rng.pth")
    expected = draws()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True, map_location="cuda"))
    assert draws() == expected
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    with preserved_rng():
        draws()
    assert draws() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1])
def test_seeding_a_sample_gives_the_numbers_that_each_library_gives_for_the_seed(seed: int) -> None:
    random.gauss(0, 1)  # leaves a second value behind, which seeding has to forget
    seed_all(seed)
    drawn = random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(()).item()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed >> 1)
    assert drawn == (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(()).item())


class Xpu:
    """A module of several devices, as torch.cuda and torch.xpu are."""

    def __init__(self, num: int, started: bool = True) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
        self.started = started

    def is_initialized(self) -> bool:
        return self.started

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self.generators]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.generators[device].set_state(state)

    def draw(self) -> list[float]:
        return [torch.rand(1, generator=generator).item() for generator in self.generators]


class Mps:
    """A module of the one device, as torch.mps is."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def device_count(self) -> int:
        return 1

    def get_rng_state(self) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)

    def draw(self) -> list[float]:
        return [torch.rand(1, generator=self.generator).item()]


@pytest.mark.parametrize("make", [lambda: Xpu(1), lambda: Xpu(3), Mps])
def test_generators_of_any_kind_of_device_make_the_round_trip(make: Any) -> None:
    devices = make()
    devices.draw()
    states = device_states(devices)
    expected = devices.draw()
    devices.draw()
    set_device_states(devices, states)
    assert devices.draw() == expected


def test_devices_that_are_not_started_are_left_alone() -> None:
    devices = Xpu(2, started=False)
    assert device_states(devices) == []
    before = devices.get_rng_state_all()
    set_device_states(devices, Xpu(2).get_rng_state_all()[::-1])
    assert all(map(torch.equal, before, devices.get_rng_state_all()))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_a_state_of_another_kind_of_device_restores_what_fits_and_says_so() -> None:
    state = rng_state() | {"xpu": [torch.zeros(16, dtype=torch.uint8)]}
    expected = torch.rand(3)
    with pytest.warns(UserWarning, match="1 XPU devices in use, but here there are 0"):
        set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_torchs_modules_have_what_is_asked_of_them(name: str) -> None:
    devices = torch.get_device_module(name)
    assert callable(devices.device_count)
    assert callable(devices.set_rng_state)
    assert device_states(devices) == []
