"""Small real models, data and runs that several tests share."""

from __future__ import annotations

import functools
import operator
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

import torch_frame
from torch_frame import HookBase, Trainer

LIBRARY = str(Path(torch_frame.__file__).parent)
ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """A regression net that holds its loss: model((x, y)) -> loss; `predict(x)` -> (N, 1).

    Args:
        dropout, norm: with a dropout layer, a batch-norm layer.
        seed: of the weights; the global generator is left alone.
    """

    def __init__(self, *, dropout: bool = False, norm: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [nn.Linear(3, 8)]
            layers += [nn.BatchNorm1d(8)] if norm else []
            layers += [nn.ReLU()]
            layers += [nn.Dropout(0.3)] if dropout else []
            self.layers = nn.Sequential(*layers, nn.Linear(8, 1))

    def predict(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, batch: Any) -> Any:
        x, y = batch
        return F.mse_loss(self.predict(x), y)


class DictNet(Net):
    """Returns a dict of losses, one of them a plain number, as YOLOX does."""

    def forward(self, batch: Any) -> Any:
        x, y = batch
        predicted = self.predict(x)
        return {"mse": F.mse_loss(predicted, y), "l1": 0.3 * F.l1_loss(predicted, y), "off": 0.0}


class Unsized:
    """Batches that have no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(make_batches())


class UserError(Exception):
    """Raised by the code that a user brings."""


def fail(*args: Any) -> Any:
    raise UserError


class CountingHook(HookBase):
    """Counts epochs, and keeps the count in the checkpoint."""

    def __init__(self) -> None:
        self.count = 0

    def after_epoch(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def make_batches(num: int = 5, size: int = 4, *, last: int | None = None, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`num` batches of `size` samples, the last one of `last`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (num - 1) + [last or size] if num else []
    return [(torch.randn(n, 3, generator=generator), torch.randn(n, 1, generator=generator)) for n in sizes]


def make_trainer(
    work_dir: Path,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    lr_scheduler: Any = None,
    data: Iterable[Any] | None = None,
    max_epochs: int = 2,
    **kwargs: Any,
) -> Trainer:
    """A trainer without hooks, for what a test does not care about."""
    model = Net() if model is None else model
    optimizer = SGD(model.parameters(), lr=0.05) if optimizer is None else optimizer
    data = make_batches() if data is None else data
    return Trainer(model, optimizer, lr_scheduler, data, max_epochs, work_dir, **{"hooks": [], **kwargs})


def train_by_hand(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    epochs: int,
    *,
    clip: float = 0.0,
    each_epoch: Any = None,
    each_iter: Any = None,
) -> None:
    """The loop that people write."""
    for _ in range(epochs):
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            output = model(batch)
            loss = functools.reduce(operator.add, output.values()) if isinstance(output, Mapping) else output
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if each_iter is not None:
                each_iter.step()
        if each_epoch is not None:
            each_epoch.step()


def copied(value: Any) -> Any:
    """A deep copy of nested tensors and plain values."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state, to compare with later."""
    result: dict[str, Tensor] = copied(model.state_dict())
    return result


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nested values differ in any bit; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        return [] if same else [f"{place}: {a.tolist()} != {b.tolist()}"]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if list(a) != list(b):
            return [f"{place}: keys {list(a)} != {list(b)}"]
        return [line for key in a for line in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{place}: {len(a)} elements != {len(b)}"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a!r} != {b!r}"]


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def raised_by(call: Callable[[], Any], error: type[BaseException]) -> BaseException:
    """The error that `call` ends with."""
    try:
        call()
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was not raised")


def library_frames(error: BaseException) -> list[str]:
    """The torch_frame functions in an error's traceback, above the code that raised it."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename.startswith(LIBRARY):
            frames.append(code.co_qualname)
        traceback = traceback.tb_next
    return frames


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, from which others import torch_frame and the tests wherever they run."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(LIBRARY).parent), str(ROOT)]), **changes}


def run_python(code: str, cwd: Path, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with the interpreter and the import paths of this one."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        **{"cwd": cwd, "capture_output": True, "text": True, "timeout": 120, "env": environment(), **kwargs},
        check=False,
    )
