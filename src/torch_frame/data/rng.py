"""Every random number generator a training run draws from: seed them, save them, restore them."""

from __future__ import annotations

import functools
import operator
import os
import random
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

_MAX_SEED = 2**32 - 1  # numpy's and PYTHONHASHSEED's limit

# The instance behind the functions of `random`, and its seeding without the Python around it: for integers the same.
python_generator: Any = random.seed.__self__  # type: ignore[attr-defined]  # a bound method
_seed_python = super(random.Random, python_generator).seed
_seed_numpy, _seed_torch = np.random.seed, torch.default_generator.manual_seed

numpy_random: Any = np.random
"""Its stubs leave out the two functions that read and exchange the global generator."""

# Where a DataLoader may carry a torch.Generator of its own.
_GENERATOR_PLACES = ("generator", "sampler.generator", "batch_sampler.generator", "batch_sampler.sampler.generator")


def set_random_seed(seed: int, rank: int = 0) -> None:
    """Seeds python, numpy, torch and every CUDA device with `seed + rank`, and makes cuDNN deterministic.

    CUDA is not started: its generators take the seed when it is. `PYTHONHASHSEED` is set for the processes started from
    here; this one has read it already.

    Args:
        seed: 0 to 2**32 - 1, `rank` included.
        rank: of this process, so that each rank draws different numbers.

    Raises:
        TypeError: `seed` or `rank` is not an integer.
        ValueError: `seed + rank` is out of range.

    >>> set_random_seed(42)
    >>> first = torch.rand(1)
    >>> set_random_seed(42)
    >>> bool(torch.rand(1) == first)
    True
    """
    seed = _checked_seed(seed, rank)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA, MPS and XPU too, each of them lazily
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    os.environ["PYTHONHASHSEED"] = str(seed)


PYTHON, NUMPY, TORCH = 1, 2, 4
ALL_GENERATORS = PYTHON | NUMPY | TORCH
"""The global CPU generators, as bits of a set."""


def seed_all(seed: int) -> None:
    """Seed the global CPU generators of python, numpy and torch with a 64-bit number: 7 us, for one sample's augmentation.

    `torch.manual_seed` would take 90 us: it also seeds devices.
    """
    for seed_one in SEEDERS.values():
        seed_one(seed)


def seed_python(seed: int) -> None:
    _seed_python(seed)
    python_generator.gauss_next = None


def seed_numpy(seed: int) -> None:
    _seed_numpy(seed & _MAX_SEED)


def seed_torch(seed: int) -> None:
    _seed_torch(seed >> 1)


SEEDERS: dict[int, Callable[[int], None]] = {PYTHON: seed_python, NUMPY: seed_numpy, TORCH: seed_torch}


@functools.cache
def seeder(generators: int) -> Callable[[int], None] | None:
    """A function that seeds these generators with a 64-bit number, with the bits of `seed_all`; None for none of them."""
    chosen = [seed_one for generator, seed_one in SEEDERS.items() if generator & generators]
    if len(chosen) < 2:
        return chosen[0] if chosen else None

    def seed(number: int) -> None:
        for seed_one in chosen:
            seed_one(number)

    return seed


def rng_state() -> dict[str, Any]:
    """Returns the state of all generators, in types that `torch.load(weights_only=True)` accepts.

    Returns:
        "python": what `random.getstate()` gives. "numpy": the global generator's state dict, its arrays as tensors.
        "torch": the CPU generator's bytes. "cuda": a list with each device's bytes, empty while CUDA is not started. On a machine
        with another accelerator its own type ("xpu", "mps") as well, in the same way; those two were never run.
    """
    return {
        "python": random.getstate(),
        "numpy": _arrays_to_tensors(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": device_states(torch.cuda),
        **{name: device_states(module) for name, module in _other_accelerators().items()},
    }


def device_states(devices: Any) -> list[Tensor]:
    """The state of each device's generator; empty while the devices are not started.

    Args:
        devices: the module of a kind of devices, as `torch.get_device_module` gives it.
    """
    if not _num_in_use(devices):
        return []
    return list(devices.get_rng_state_all()) if hasattr(devices, "get_rng_state_all") else [devices.get_rng_state()]


def set_device_states(devices: Any, states: Sequence[Tensor]) -> None:
    """Restore what `device_states` gave, of the devices that are here."""
    indexed = hasattr(devices, "get_rng_state_all")  # mps has one device, which has no index
    for index, state in enumerate(states[: _num_in_use(devices)]):
        devices.set_rng_state(state.cpu(), *((index,) if indexed else ()))


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts all generators where they were when `rng_state()` gave `state`.

    Warns:
        UserWarning: `state` has another number of devices than are in use here. Those that both have are restored.

    >>> state = rng_state()
    >>> first = random.random(), np.random.rand(), torch.rand(1).item()
    >>> set_rng_state(state)
    >>> (random.random(), np.random.rand(), torch.rand(1).item()) == first
    True
    """
    here = _device_modules()
    for name in dict.fromkeys([*here, *(key for key in state if key not in _ON_THE_CPU)]):
        num_saved, num_here = len(state.get(name, ())), _num_in_use(here[name]) if name in here else 0
        if num_saved != num_here:
            warnings.warn(
                f"The random state was saved with {num_saved} {name.upper()} devices in use, but here there are {num_here}: "
                f"{min(num_saved, num_here)} are restored, and random numbers drawn on others differ from the saved run's. "
                f"For an exact resume restore it with as many devices, after {name.upper()} has been started.",
                stacklevel=2,
            )
    _restore(state)


@contextmanager
def preserved_rng() -> Generator[None, None, None]:
    """Restores all generators afterwards, after an exception too, so that what is drawn inside leaves no trace.

    Costs 0.1 ms on the CPU: meant for an evaluation, not for a step. Generators of devices are restored where these were
    started before.

    >>> state = torch.get_rng_state()
    >>> with preserved_rng():
    ...     _ = torch.rand(100)
    >>> torch.equal(torch.get_rng_state(), state)
    True
    """
    state = rng_state()
    try:
        yield
    finally:
        _restore(state)


def start_persistent_workers(loader: Any) -> None:
    """Start the workers of a `DataLoader(persistent_workers=True)` now.

    Starting them draws from the global generator, once in a loader's life: a resumed run has to do it before it restores the
    random numbers of a moment when they had long been started.
    """
    if isinstance(loader, DataLoader) and loader.persistent_workers and loader._iterator is None:
        iter(loader)


def loader_generator_states(loader: object) -> dict[str, Tensor]:
    """Returns the states of the `torch.Generator`s that a DataLoader or its samplers were given, keyed by their place.

    One generator in several places counts once. What is not a DataLoader gives {}.

    >>> loader = DataLoader(range(4), shuffle=True, generator=torch.Generator())
    >>> list(loader_generator_states(loader))
    ['generator']
    """
    return {place: generator.get_state() for place, generator in loader_generators(loader).items()}


def set_loader_generator_states(loader: object, states: Mapping[str, Tensor]) -> None:
    """Puts the generators of `loader` where they were when `loader_generator_states` gave `states`.

    Warns:
        UserWarning: `loader` carries its generators in other places than `states` names. Those in both are restored.
    """
    generators = loader_generators(loader)
    for place in generators.keys() & states.keys():
        generators[place].set_state(states[place].cpu())
    if generators.keys() != states.keys():
        warnings.warn(
            f"The data loader carries its own generators at {sorted(generators)}, but the saved one had them at "
            f"{sorted(states)}: those in both are restored. Random numbers drawn from the others differ from the saved "
            "run's; for an exact resume build the loader as it was.",
            stacklevel=2,
        )


def _checked_seed(seed: int, rank: int) -> int:
    try:
        total = operator.index(seed) + operator.index(rank)
    except TypeError:
        raise TypeError(
            f"seed and rank have to be integers, but we got seed={seed!r} and rank={rank!r}. Pass seed=int(...)."
        ) from None
    if seed < 0 or rank < 0 or total > _MAX_SEED:
        raise ValueError(
            f"seed and rank have to be 0 or more, with a sum of at most {_MAX_SEED}, but we got seed={seed} and "
            f"rank={rank}. Pass a smaller seed, such as seed % 2**31."
        )
    return total


def _restore(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(_tensors_to_arrays(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())  # .cpu(): loading with map_location="cuda" moves the bytes as well
    for name, devices in _device_modules().items():
        set_device_states(devices, state.get(name, ()))


_ON_THE_CPU = ("python", "numpy", "torch")


def _device_modules() -> dict[str, Any]:
    """Type of device -> its module: CUDA's, and that of this machine's accelerator if it is another one."""
    return {"cuda": torch.cuda, **_other_accelerators()}


def _other_accelerators() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type == "cuda":
        return {}
    return {accelerator.type: torch.get_device_module(accelerator.type)}


def _num_in_use(devices: Any) -> int:
    """0 while the devices are not started: a state set then would be overwritten by a seed that is still queued."""
    started = devices.is_initialized() if hasattr(devices, "is_initialized") else True
    return int(devices.device_count()) if started else 0


def _arrays_to_tensors(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _arrays_to_tensors(value) for key, value in state.items()}
    return torch.from_numpy(state) if isinstance(state, np.ndarray) else state


def _tensors_to_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _tensors_to_arrays(value) for key, value in state.items()}
    return state.cpu().numpy() if isinstance(state, Tensor) else state


def loader_generators(loader: object) -> dict[str, torch.Generator]:
    """A loader's generators by place; the loader's own first, so that a shared one gets that name."""
    if not isinstance(loader, DataLoader):
        return {}
    found: dict[str, torch.Generator] = {}
    for place in _GENERATOR_PLACES:
        part: Any = loader
        owner: Any = None
        for name in place.split("."):
            owner, part = part, getattr(part, name, None)
        if type(owner).__name__ == "SeedableRandomSampler":  # accelerate's, which seeds it anew in each epoch
            continue
        if isinstance(part, torch.Generator) and all(part is not other for other in found.values()):
            found[place] = part
    return found
