"""Modules that load in their own way are asked on a copy, before they are changed and before anything is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.small_runs import copied, differences, make_batches, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, HookBase, Trainer
from torch_frame.checkpoint import misfits as misfits_module
from torch_frame.checkpoint.misfits import loads_in_its_own_way, misfits
from torch_frame.checkpoint.weights import load_weights


class Plain(nn.Module):
    """(N, 3) -> (N, 1); x and y come as a batch, the loss goes out."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.base, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.head(self.base(x)) - y).square().mean()


class Grows(Plain):
    """A buffer that grows as it trains; loading resizes it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, batch: Any) -> Tensor:
        loss = super().forward(batch)
        if self.training:
            self.seen = torch.cat([self.seen, loss.detach().reshape(1)])
        return loss + 0.01 * self.seen.sum()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.seen = torch.empty_like(state_dict[prefix + "seen"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class SavedTrained(Plain):
    """Its `state_dict` leaves out what is frozen."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name not in frozen}


class Renamed(Plain):
    """Takes the names that it had in an older version."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.register_load_state_dict_pre_hook(rename)


def rename(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in list(state):
        if name.startswith(prefix + "old_base."):
            state[name.replace("old_base.", "base.")] = state.pop(name)


class Extra(Plain):
    """Keeps more than tensors."""

    def __init__(self, extra: Any, seed: int = 0) -> None:
        super().__init__(seed)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.got = state


class Refuses(Extra):
    def set_extra_state(self, state: Any) -> None:
        raise KeyError("another version")


class Unfreeze(HookBase):
    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.trainer.model.base.requires_grad_(True)  # type: ignore[union-attr]


class SaveInside(HookBase):
    def after_iter(self) -> None:
        if self.trainer.cur_iter == 6:
            self.trainer.save_checkpoint("inside.pth", save_single_model=False)  # type: ignore[attr-defined]


def make_run(folder: Path, model: nn.Module, *, hooks: Any = (), **settings: Any) -> Trainer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    more = {"hooks": [*hooks, CheckpointerHook()], "create_new_dir": None, **settings}
    return Trainer(model, optimizer, None, make_batches(), 2, folder, **more)


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("make", [Plain, Grows, SavedTrained, Renamed])
def test_a_run_is_resumed_whatever_way_its_model_loads(
    make: Callable[[int], Plain], freezes: bool, use_ema: bool, tmp_path: Path
) -> None:
    if make is Grows and use_ema:
        pytest.skip("EMA follows buffers, and this one is read in evaluation only")
    ends = []
    for resumed in (False, True):
        model = make(0)
        model.base.requires_grad_(not freezes)
        hooks: list[HookBase] = [Unfreeze()] if freezes else []
        trainer = make_run(tmp_path, model, hooks=hooks if resumed else [*hooks, SaveInside()], use_ema=use_ema)
        if resumed:
            trainer.load_checkpoint("inside.pth")
        trainer.train(5, 2)
        average = trainer.model_ema.model if trainer.model_ema is not None else model
        ends.append(copied([dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, average)]))
        best = torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)
        assert set(best) == set(model.state_dict())
    assert differences(ends[0], ends[1]) == []


EXTRAS = {"dict": {"n": 3}, "float64": np.float64(0.5), "array": np.arange(3), "tensor": torch.ones(2), "none": None}


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("name", EXTRAS)
def test_extra_state_is_in_every_file_and_comes_back(name: str, use_ema: bool, tmp_path: Path) -> None:
    make_run(tmp_path, Extra(EXTRAS[name]), use_ema=use_ema).train(5, 2)
    best = torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)
    other = Extra(None)
    trainer = make_run(tmp_path, other, use_ema=use_ema)
    trainer.load_checkpoint("latest.pth")
    for value in (best["_extra_state"], other.got):
        assert np.array_equal(np.asarray(value, dtype=object), np.asarray(EXTRAS[name], dtype=object))


def test_a_model_that_refuses_is_asked_before_it_is_changed(tmp_path: Path) -> None:
    make_run(tmp_path, Extra({"n": 1}), use_ema=True).train(5, 2)
    model = Refuses({"n": 2}, seed=4)
    trainer = make_run(tmp_path, model, use_ema=True)
    assert trainer.model_ema is not None
    before = copied([weights_of(model), trainer.model_ema.model.state_dict(), trainer.optimizer.state_dict()])
    error = raised_by(lambda: trainer.load_checkpoint("latest.pth"), CheckpointError)
    assert "the model refuses it: KeyError: 'another version'" in str(error)
    after = copied([weights_of(model), trainer.model_ema.model.state_dict(), trainer.optimizer.state_dict()])
    assert differences(before, after) == []
    assert (trainer.progress.epoch, trainer.model_ema.updates) == (0, 0)


def test_old_names_are_taken_as_the_model_takes_them() -> None:
    source, model = Plain(1), Renamed(2)
    old = {name.replace("base", "old_base"): value for name, value in source.state_dict().items()}
    assert misfits(model, model.state_dict(), old) == []
    assert differences(copied(model.state_dict()), copied(Renamed(2).state_dict())) == []
    assert load_weights(model, old).complete
    assert differences(copied(model.state_dict()), copied(source.state_dict())) == []
    assert misfits(model, model.state_dict(), {**old, "more": torch.ones(1)}) == ["the model has no more"]
    assert misfits(model, model.state_dict(), {"head.bias": old["head.bias"]}) != []


def test_an_ordinary_model_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "deepcopy", None)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2), nn.LSTM(2, 2))
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager")
    for module in (model, compiled):
        assert not loads_in_its_own_way(module)
        assert misfits(module, module.state_dict(), module.state_dict()) == []


def test_a_model_is_asked_without_its_values_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    copied_before = misfits_module._copied

    def copied_now(module: nn.Module, *, with_values: bool) -> nn.Module:
        asked.append(with_values)
        return copied_before(module, with_values=with_values)

    monkeypatch.setattr(misfits_module, "_copied", copied_now)
    model = Extra({"n": 1})
    assert misfits(model, model.state_dict(), model.state_dict()) == []
    assert asked == [False]


def test_a_model_that_cannot_be_copied_is_compared() -> None:
    model = Extra({"n": 1})
    model.lock = (n for n in range(3))  # a generator
    assert misfits(model, model.state_dict(), model.state_dict()) == []
    assert misfits(model, model.state_dict(), {}) != []
