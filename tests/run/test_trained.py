"""Which parameters are trained is part of the run: hooks that unfreeze layers, and what a resume makes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.small_runs import copied, differences, make_batches, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, HookBase, Trainer
from torch_frame.checkpoint import inspect as checkpoint_inspect
from torch_frame.cli import inspect as cli_inspect


def make_model(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    return model


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


class Unfreezing(HookBase):
    """Trains the first layer from epoch 1 on, in a group of its own."""

    def unfreeze(self) -> None:
        layer = self.trainer.model[0]  # type: ignore[index]
        layer.requires_grad_(True)
        self.trainer.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.02})

    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.unfreeze()


class WithState(Unfreezing):
    """Does so again when it gets its state."""

    done = False

    def before_epoch(self) -> None:
        super().before_epoch()
        self.done = self.done or self.trainer.epoch == 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["done"] and not self.done:
            self.done = True
            self.unfreeze()


class BeforeTraining(Unfreezing):
    """Does so again before the run continues."""

    def before_train(self) -> None:
        if self.trainer.start_epoch >= 1:
            self.unfreeze()


def make_run(
    folder: Path, hook: HookBase, *, epochs: int = 4, seed: int = 0, schedule: bool = True, **more: Any
) -> Trainer:
    model = make_model(seed)
    optimizer = SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if schedule else None
    settings: dict[str, Any] = {"step_fn": loss_of, "create_new_dir": None, **more}
    return Trainer(
        model, optimizer, scheduler, make_batches(), epochs, folder, hooks=[hook, CheckpointerHook()], **settings
    )


@pytest.mark.parametrize("kind", [WithState, BeforeTraining])
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_hook_that_unfreezes_layers_can_do_so_again(kind: type[Unfreezing], use_ema: bool, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", kind(), use_ema=use_ema)
    whole.train(5, 2)
    make_run(tmp_path / "parts", kind(), epochs=3, use_ema=use_ema).train(5, 2)
    parts = make_run(tmp_path / "parts", kind(), seed=5, resume="auto", use_ema=use_ema)
    parts.train(5, 2)
    ends = [
        copied([t.model.state_dict(), t.optimizer.state_dict(), t.lr_scheduler.state_dict()]) for t in (whole, parts)
    ]
    assert differences(ends[0], ends[1]) == []


def test_a_hook_that_does_not_is_an_error_that_names_the_layers(tmp_path: Path) -> None:
    make_run(tmp_path, Unfreezing(), epochs=3).train(5, 2)
    trainer = make_run(tmp_path, Unfreezing(), resume="auto")
    for _ in range(2):  # a second call does not go on without the state either
        error = raised_by(lambda: trainer.train(5, 2), CheckpointError)
        assert (
            "had 0.weight, 0.bias, now it has not; a hook that unfreezes layers adds them in load_state_dict or"
            in str(error)
        )


def test_after_a_resume_that_failed_training_does_not_begin_anew(tmp_path: Path) -> None:
    make_run(tmp_path, WithState(), epochs=1).train(5, 2)
    trainer = make_run(tmp_path, WithState(), resume="auto", precision="bf16")
    for _ in range(2):
        raised_by(lambda: trainer.train(5, 2), CheckpointError)
    assert trainer.progress.iter == 0


def test_where_a_resume_fails_what_hooks_changed_is_put_back(tmp_path: Path) -> None:
    make_run(tmp_path, WithState(), epochs=3).train(5, 2)
    hook = WithState()
    trainer = make_run(tmp_path, hook, seed=5, precision="bf16", use_ema=True)
    assert trainer.model_ema is not None
    scheduler, metrics = trainer.lr_scheduler, trainer.metric_storage

    def everything() -> Any:
        held: list[Any] = [trainer.model, trainer.optimizer, scheduler, trainer.progress, metrics]
        flags = [p.requires_grad for p in trainer.model.parameters()]
        return copied([*(one.state_dict() for one in held), flags, hook.done, trainer.model_ema.model.state_dict()])

    before = everything()
    error = raised_by(lambda: trainer.load_checkpoint("latest.pth"), CheckpointError)
    assert "precision was fp32" in str(error)
    assert "use_ema was False" in str(error)
    assert differences(before, everything()) == []
    assert len(trainer.optimizer.param_groups) == 1


class Thaw(HookBase):
    """Trains the first layer, which the optimizer has from the beginning, from epoch 1 on."""

    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.trainer.model.requires_grad_(True)


def test_requires_grad_comes_back_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ends = []
    for folder, epochs, seed in (("whole", 4, 0), ("parts", 3, 0), ("parts", 4, 7)):
        model = make_model(seed)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        hooks = [Thaw(), CheckpointerHook()]
        settings: dict[str, Any] = {"hooks": hooks, "step_fn": loss_of, "create_new_dir": None, "resume": "auto"}
        caplog.clear()
        Trainer(model, optimizer, None, make_batches(), epochs, tmp_path / folder, **settings).train(5, 2)
        ends.append(weights_of(model))
    assert differences(ends[0], ends[2]) == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["0.weight, 0.bias are trained, as saved; the script had them frozen."]
    assert "0.weight, 0.bias are trained" in (tmp_path / "parts" / "log.txt").read_text()


# ---------------------------------------------------------------- save_frozen=False


class Tuned(nn.Module):
    """A frozen base with batch norm, and an adapter beside it, as LoRA has it.

    Args:
        base: seed of the base.
        width: of the base.
    """

    def __init__(self, base: int = 0, *, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base)
            self.base = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 3)).requires_grad_(
                False
            )
            torch.manual_seed(100 + seed)
            self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 1)
        self.mask = nn.Parameter(torch.tensor([0.0, -1.0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x).sum(1, keepdim=True) + self.up(self.down(x)) + self.mask.exp().sum()


ADAPTER = {"down.weight", "up.weight", "up.bias"}
BUFFERS = {"base.1.running_mean", "base.1.running_var", "base.1.num_batches_tracked"}
BASE = {"base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias", "base.2.weight", "base.2.bias", "mask"}


class Inside(HookBase):
    """Saves the whole state inside the last epoch."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == 16:
            self.trainer.save_checkpoint("inside.pth", save_single_model=False)  # type: ignore[attr-defined]


def tune(folder: Path, model: nn.Module, *hooks: HookBase, load: str | None = None, **more: Any) -> Trainer:
    """Train for 4 epochs of 5 batches. The optimizer holds all parameters, as most scripts have it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    settings: dict[str, Any] = {
        "step_fn": loss_of,
        "create_new_dir": None,
        "use_ema": True,
        "save_frozen": False,
        **more,
    }
    trainer = Trainer(
        model, optimizer, None, make_batches(), 4, folder, hooks=[*hooks, Inside(), CheckpointerHook()], **settings
    )
    if trainer.model_ema is not None:
        trainer.model_ema.updates = 2000  # else it would hardly differ from the weights
    if load is not None:
        trainer.load_checkpoint(load)
    trainer.train(5, 2)
    return trainer


def end_of(trainer: Trainer) -> Any:
    average = trainer.model_ema
    held: list[Any] = [trainer.model, trainer.optimizer, *([] if average is None else [average.model])]
    return copied([one.state_dict() for one in held])


def file(folder: Path, name: str) -> Any:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.mark.parametrize("use_ema", [False, True])
def test_without_the_frozen_base_a_run_resumes_to_the_same_bits(use_ema: bool, tmp_path: Path) -> None:
    with_all = tune(tmp_path / "with_all", Tuned(), use_ema=use_ema, save_frozen=True)
    whole = tune(tmp_path / "run", Tuned(), use_ema=use_ema)
    parts = tune(tmp_path / "run", Tuned(seed=9), use_ema=use_ema, load="inside.pth")
    assert differences(end_of(with_all), end_of(whole)) == []
    assert differences(end_of(whole), end_of(parts)) == []
    state = file(tmp_path / "run", "inside.pth")
    assert set(state["model"]) == set(file(tmp_path / "run", "best.pth")) == ADAPTER | BUFFERS
    assert set(state["frozen"]) == BASE
    assert not use_ema or set(state["ema"]["model"]) == ADAPTER | BUFFERS


def test_files_and_average_are_as_small_as_the_adapter(tmp_path: Path) -> None:
    model = Tuned(width=4000)
    trainer = tune(tmp_path, model)
    assert sum(p.numel() * 4 for p in model.base.parameters()) > 120_000
    model.base[1].reset_running_stats()
    for path in (tmp_path / "checkpoints").iterdir():
        buffers = 2 * (2 if path.name in ("latest.pth", "previous.pth", "inside.pth") else 1) * 4000 * 4
        assert path.stat().st_size < buffers + 30_000, path.name
    assert trainer.model_ema is not None
    assert trainer.model_ema.model.base[0].weight is model.base[0].weight  # type: ignore[index, union-attr]


@pytest.mark.parametrize("save_frozen", [False, True])
def test_another_base_is_an_error_and_nothing_is_changed(save_frozen: bool, tmp_path: Path) -> None:
    tune(tmp_path, Tuned())
    model = Tuned(base=1)
    before = weights_of(model)
    error = raised_by(lambda: tune(tmp_path, model, load="inside.pth", save_frozen=save_frozen), CheckpointError)
    assert "base.0.weight, base.0.bias" in str(error)
    assert "other values than those that the run was trained on" in str(error)
    assert differences(weights_of(model), before) == []
    error = raised_by(lambda: tune(tmp_path, Tuned(width=4), load="inside.pth"), CheckpointError)
    assert "base.0.weight" in str(error)


def test_the_setting_may_change_on_the_way(tmp_path: Path) -> None:
    whole = tune(tmp_path / "whole", Tuned(), save_frozen=True)
    for first in (False, True):
        folder = tmp_path / f"from_{first}"
        tune(folder, Tuned(), save_frozen=first)
        model = Tuned(seed=3)
        parts = tune(folder, model, load="inside.pth", save_frozen=not first)
        assert differences(end_of(whole), end_of(parts)) == []
        names = set(file(folder, "latest.pth")["model"])
        assert names == (ADAPTER | BUFFERS if first else ADAPTER | BUFFERS | BASE)


class TrainIn(HookBase):
    """Trains the base's last layer in one epoch only."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def before_epoch(self) -> None:
        self.trainer.model.base[2].requires_grad_(self.trainer.epoch == self.at)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("epoch", [1, 3])
def test_what_was_trained_and_frozen_later_stays_in(epoch: int, tmp_path: Path) -> None:
    with_all = tune(tmp_path / "with_all", Tuned(), TrainIn(epoch), save_frozen=True)
    whole = tune(tmp_path / "run", Tuned(), TrainIn(epoch))
    parts = tune(tmp_path / "run", Tuned(), TrainIn(epoch), load="inside.pth")
    assert differences(end_of(with_all), end_of(whole)) == []
    assert differences(end_of(whole), end_of(parts)) == []
    trained = {"base.2.weight", "base.2.bias"}
    for name in ("inside.pth", "latest.pth"):
        assert set(file(tmp_path / "run", name)["model"]) == ADAPTER | BUFFERS | trained


class Momentum(HookBase):
    """The base's last layer follows the adapter, as a momentum encoder does: frozen, written to past autograd."""

    def __init__(self, way: str) -> None:
        self.way = way

    def after_iter(self) -> None:
        weight, source = self.trainer.model.base[2].bias, self.trainer.model.up.bias  # type: ignore[index, union-attr]
        if self.way == "in place":
            with torch.no_grad():
                weight.mul_(0.9).add_(source.detach(), alpha=0.1)
        elif self.way == "data in place":
            weight.data.mul_(0.9).add_(source.detach(), alpha=0.1)
        elif self.way == "new data":
            weight.data = weight.data * 0.9 + source.detach() * 0.1
        else:
            new = nn.Parameter(weight.detach() * 0.9 + source.detach() * 0.1, requires_grad=False)
            self.trainer.model.base[2].bias = new  # type: ignore[index, union-attr]


@pytest.mark.parametrize("way", ["in place", "data in place", "new data"])
def test_a_frozen_parameter_that_is_written_to_is_saved(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tune(tmp_path, Tuned(), Momentum(way), use_ema=False)
    lines = [record.getMessage() for record in caplog.records if "have changed" in record.getMessage()]
    assert lines == ["Frozen parameters have changed, and are saved from now on: base.2.bias."]
    parts = tune(tmp_path, Tuned(), Momentum(way), use_ema=False, load="inside.pth")
    assert differences(end_of(whole), end_of(parts)) == []


def test_another_parameter_under_the_name_of_a_frozen_one_is_saved(tmp_path: Path) -> None:
    trainer = tune(tmp_path, Tuned(), Momentum("another parameter"), use_ema=False)
    assert torch.equal(file(tmp_path, "latest.pth")["model"]["base.2.bias"], trainer.model.base[2].bias)  # type: ignore[index, union-attr]


def test_weights_of_such_a_run_are_loaded_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tune(tmp_path, Tuned())
    best = file(tmp_path, "best.pth")
    for save_frozen, warned in ((False, False), (True, True)):
        model = Tuned(seed=4)
        optimizer = torch.optim.Adam(model.parameters())
        trainer = Trainer(model, optimizer, None, make_batches(), 1, tmp_path, hooks=[], save_frozen=save_frozen)
        caplog.clear()
        trainer.load_checkpoint(checkpoint=best)
        assert any("fit in part" in record.getMessage() for record in caplog.records) is warned
        assert (
            differences(copied(model.up.state_dict()), {name[3:]: best[name] for name in ("up.weight", "up.bias")})
            == []
        )


def test_inspect_says_what_is_not_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(tmp_path, Tuned())
    path = str(tmp_path / "checkpoints" / "latest.pth")
    assert set(checkpoint_inspect.inspect(path)["left_out"]) == BASE
    capsys.readouterr()
    assert cli_inspect.inspect(path) == 0
    assert (
        "7 frozen parameters that the script brings (save_frozen=False): mask, base.0.weight, base.0.bias, ..."
        in capsys.readouterr().out
    )
