"""AccelerateTrainer: the same loop on accelerate, and what 1.7's scripts do with it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.distributed.processes import Failed, on_processes, one_thread
from tests.small_runs import ROOT, Net, differences, make_batches, weights_of
from torch_frame import (
    AccelerateTrainer,
    CheckpointerHook,
    CheckpointError,
    EvalHook,
    HookBase,
    LoggerHook,
    SettingError,
    Trainer,
)

accelerate = pytest.importorskip("accelerate")

__all__ = ["one_thread"]


@pytest.fixture(autouse=True)
def _new_state() -> Iterator[None]:
    """accelerate keeps one state for a process, which begins with its first Accelerator."""
    reset()
    yield
    reset()


def reset() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_loader(size: int = 40, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(size, 3, generator=generator), torch.randn(size, 1, generator=generator))
    return DataLoader(data, batch_size, shuffle=True)


def make(kind: type[Trainer], folder: Path, epochs: int = 3, *, model: nn.Module | None = None, **settings: Any) -> Any:
    """A trainer of this kind, whose runs are equal in all else."""
    model = Net(dropout=True) if model is None else model
    optimizer = AdamW(model.parameters(), lr=0.01)
    schedule = settings.pop("schedule", None) or StepLR(optimizer, 1, gamma=0.5)
    loader = settings.pop("loader") if "loader" in settings else make_loader()
    settings = {"hooks": [], "seed": 5, "create_new_dir": None, **settings}
    return kind(model, optimizer, schedule, loader, epochs, folder, **settings)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, ragged": {"gradient_accumulation_steps": 2},
    "clipped": {"clip_grad_norm": 0.05},
    "ema": {"use_ema": True, "ema_decay": 0.9},
    "warm-up": {"warmup_method": "linear", "warmup_iters": 4},
    "all": {
        "gradient_accumulation_steps": 2,
        "clip_grad_norm": 0.05,
        "use_ema": True,
        "warmup_method": "linear",
        "warmup_iters": 4,
    },
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_process_has_the_bits_of_the_plain_trainer(name: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = make(Trainer, tmp_path / "plain", precision=precision, **SETTINGS[name])
    plain.train(5, 5)
    torch.manual_seed(3)
    mixed = {"fp32": "no"}.get(precision, precision)
    ours = make(AccelerateTrainer, tmp_path / "ours", mixed_precision=mixed, **SETTINGS[name])
    ours.train(5, 5)
    assert differences(weights_of(ours.model_or_module), weights_of(plain.model)) == []
    assert differences(weights_of(ours.model_evaluate), weights_of(plain.model_evaluate)) == []
    assert ours.metric_storage["total_loss"].latest == plain.metric_storage["total_loss"].latest


class Stop(HookBase):
    """Ends the run in the middle of an epoch, by an error, with its state saved before."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_iter(self) -> None:
        if self.trainer.cur_iter == self.at:
            self.trainer.save_checkpoint("latest.pth", save_single_model=False)
            raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(schedule: str | None, tmp_path: Path) -> None:
    settings = {**SETTINGS["all"], "mixed_precision": "bf16", "schedule": schedule}
    if schedule is not None:
        settings.pop("warmup_method")
    torch.manual_seed(3)
    whole = make(AccelerateTrainer, tmp_path / "whole", **settings)
    whole.train(5, 5)
    torch.manual_seed(3)
    first = make(AccelerateTrainer, tmp_path / "parts", **{**settings, "hooks": [Stop(6)]})
    with pytest.raises(KeyboardInterrupt):
        first.train(5, 5)
    torch.manual_seed(4)
    second = make(AccelerateTrainer, tmp_path / "parts", resume="auto", **settings)
    second.train(5, 5)
    assert second.start_epoch == 1
    assert differences(weights_of(second.model_or_module), weights_of(whole.model_or_module)) == []
    assert second.lr == whole.lr


def test_a_state_of_the_plain_trainer_goes_on_here(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = make(Trainer, tmp_path / "whole")
    whole.train(5, 5)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        make(Trainer, tmp_path / "parts", hooks=[Stop(7)]).train(5, 5)
    second = make(AccelerateTrainer, tmp_path / "parts", resume="auto")
    second.train(5, 5)
    assert differences(weights_of(second.model_or_module), weights_of(whole.model)) == []


# ---------------------------------------------------------------- the accelerator


class Look(HookBase):
    """What a hook finds, and when `prepare_model` was called."""

    def before_train(self) -> None:
        self.device = self.trainer.accelerator.device  # type: ignore[attr-defined]
        self.calls = list(self.trainer.calls)  # type: ignore[attr-defined]


class Prepares(AccelerateTrainer):
    """As scripts of 1.7 override it: all four are prepared."""

    calls: ClassVar[list[bool]] = []

    def prepare_model(self) -> None:
        self.calls = [*self.calls, os.path.exists(self.work_dir)]
        self.model, self.optimizer, self.data_loader, self.lr_scheduler = self.accelerator.prepare(
            self.model, self.optimizer, self.data_loader, self.lr_scheduler
        )


def test_the_accelerator_is_there_from_the_constructor_on(tmp_path: Path) -> None:
    look = Look()
    trainer = make(Prepares, tmp_path / "run", hooks=[look])
    assert isinstance(trainer.accelerator, accelerate.Accelerator)
    assert trainer.calls == []
    trainer.train(5, 5)
    assert look.device == torch.device("cpu")
    assert look.calls == [False], "once, before the folder is made and before_train"


def test_a_prepared_loader_is_left_alone_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(Prepares, tmp_path / "run", hooks=[Stop(7)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train(5, 5)
    assert type(trainer.data_loader).__module__.startswith("accelerate.")
    caplog.clear()
    again = make(Prepares, tmp_path / "run", resume="auto")
    with caplog.at_level(logging.WARNING, "torch_frame"):
        again.train(5, 5)
    assert again.progress.iter == 15
    assert "a loader whose order is its own: 3 batches are loaded again and skipped" in caplog.text


def test_a_prepared_torch_schedule_steps_once_an_epoch(tmp_path: Path) -> None:
    class PreparesItsOwn(AccelerateTrainer):
        def prepare_model(self) -> None:
            super().prepare_model()
            self.lr_scheduler = self.accelerator.prepare(StepLR(self.optimizer, 1, gamma=0.5))

    trainer = make(PreparesItsOwn, tmp_path / "run", epochs=3)
    trainer.train(5, 5)
    assert trainer.lr == pytest.approx(0.01 * 0.5**3)


def test_a_model_may_have_made_its_accelerator_before(tmp_path: Path) -> None:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.accelerator = accelerate.Accelerator(mixed_precision="bf16")

    trainer = make(AccelerateTrainer, tmp_path / "run", model=Own())
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.precision.name == "bf16"
    assert trainer.weight_dtype == torch.bfloat16
    trainer.train(5, 5)
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_another_mixed_precision_afterwards_is_a_sentence(tmp_path: Path) -> None:
    accelerate.Accelerator(mixed_precision="bf16")
    with pytest.raises(SettingError, match=r"'no'.*mixed_precision='bf16' was made in this process before"):
        make(AccelerateTrainer, tmp_path, mixed_precision="no")
    with pytest.raises(SettingError, match="'fp16', but the accelerator's is 'bf16'"):
        make(AccelerateTrainer, tmp_path, mixed_precision="fp16", accelerator=accelerate.Accelerator())
    reset()
    with pytest.raises(SettingError, match=r"mixed_precision='fp7': Unknown"):
        make(AccelerateTrainer, tmp_path, mixed_precision="fp7")


def test_what_is_no_accelerator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"accelerator is 'cpu'; it has to be an accelerate\.Accelerator"):
        make(AccelerateTrainer, tmp_path, accelerator="cpu")


@pytest.mark.parametrize("name", ["precision", "enable_amp", "strategy", "device"])
def test_what_accelerate_decides_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"takes no {name}"):
        make(AccelerateTrainer, tmp_path, **{name: None})


def test_the_accelerators_own_accumulation_becomes_the_window(tmp_path: Path) -> None:
    given = accelerate.Accelerator(gradient_accumulation_steps=2)
    trainer = make(AccelerateTrainer, tmp_path / "ours", accelerator=given)
    assert trainer.accelerator is given
    assert trainer.gradient_accumulation_steps == 2
    torch.manual_seed(3)
    trainer.train(5, 5)
    torch.manual_seed(3)
    plain = make(Trainer, tmp_path / "plain", gradient_accumulation_steps=2)
    plain.train(5, 5)
    assert differences(weights_of(trainer.model_or_module), weights_of(plain.model)) == []
    reset()
    with pytest.raises(SettingError, match="is 4, but the accelerator's is 2"):
        make(
            AccelerateTrainer,
            tmp_path,
            accelerator=accelerate.Accelerator(gradient_accumulation_steps=2),
            gradient_accumulation_steps=4,
        )


def test_without_accelerate_it_is_a_sentence() -> None:
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "import torch, torch_frame\n"
        "model = torch.nn.Linear(2, 1)\n"
        "torch_frame.AccelerateTrainer(model, torch.optim.SGD(model.parameters(), 0.1), None, [torch.ones(2, 2)], 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "SettingError: AccelerateTrainer needs accelerate" in done.stderr
    assert "pip install 'torch-frame[accelerate]'" in done.stderr


# ---------------------------------------------------------------- schedules by name

ENDS = {"linear": 0.0, "cosine": 0.0, "cosine_with_restarts": 0.0, "polynomial": 1e-7, "constant": 0.01}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_schedule_by_name_ends_with_the_run(name: str, accumulation: int, tmp_path: Path) -> None:
    trainer = make(AccelerateTrainer, tmp_path, schedule=name, warmup_iters=2, gradient_accumulation_steps=accumulation)
    trainer.train(5, 5)
    assert trainer.lr == pytest.approx(ENDS[name], abs=1e-12)
    last = trainer.metric_storage["lr"].latest
    assert name == "constant" or 0 < last < 0.01, "the last update still moved the weights"


def test_a_schedule_by_name_needs_a_length(tmp_path: Path) -> None:
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            return iter(make_batches())

    with pytest.raises(SettingError, match=r"has no length.*'constant_with_warmup'"):
        make(AccelerateTrainer, tmp_path / "linear", schedule="linear", loader=Endless()).train(5, 5)
    constant = make(AccelerateTrainer, tmp_path / "constant", schedule="constant_with_warmup", loader=Endless())
    constant.train(5, 5)
    assert constant.lr == 0.01


def test_names_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'cosinus'; it has to be one of 'linear'"):
        make(AccelerateTrainer, tmp_path, schedule="cosinus")
    with pytest.raises(SettingError, match="piecewise_constant"):
        make(AccelerateTrainer, tmp_path, schedule="piecewise_constant")


def test_a_warm_up_beside_a_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_frame"):
        make(AccelerateTrainer, tmp_path, schedule="linear", warmup_method="exp", warmup_iters=2)
        make(AccelerateTrainer, tmp_path, schedule="constant", warmup_iters=2)
        make(AccelerateTrainer, tmp_path / "run", schedule="linear", warmup_iters=15).train(5, 3)
    assert "warmup_method='exp' is ignored" in caplog.text
    assert "warmup_iters=2 is ignored by 'constant'" in caplog.text
    assert "warmup_iters is 15, but the run has 15 updates" in caplog.text


@pytest.mark.parametrize("warmup_iters", [-1, "3", 2.5])
def test_a_warm_up_that_is_no_count_is_refused(warmup_iters: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"warmup_iters is .*whole number"):
        make(AccelerateTrainer, tmp_path, schedule="linear", warmup_iters=warmup_iters)


def test_another_number_of_epochs_on_resume_is_a_choice(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": "linear", "hooks": [CheckpointerHook()]}
    make(AccelerateTrainer, tmp_path / "run", epochs=2, **settings).train(5, 5)
    settings["hooks"] = []
    with pytest.raises(CheckpointError, match="resume_settings='script'"):
        make(AccelerateTrainer, tmp_path / "run", epochs=4, resume="auto", **settings).train(5, 5)
    longer = make(AccelerateTrainer, tmp_path / "run", epochs=4, resume="auto", resume_settings="script", **settings)
    longer.train(5, 5)
    assert (longer.progress.epoch, longer.lr) == (4, 0.0)


def test_what_the_script_has_prepared_before_is_used(tmp_path: Path) -> None:
    given = accelerate.Accelerator(cpu=True)
    model = Net(dropout=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    prepared = given.prepare(model, optimizer, StepLR(optimizer, 1, gamma=0.5))
    torch.manual_seed(3)
    trainer = AccelerateTrainer(
        *prepared, make_loader(), 3, tmp_path / "ours", hooks=[], seed=5, accelerator=given, create_new_dir=None
    )
    trainer.train(5, 5)
    torch.manual_seed(3)
    plain = make(Trainer, tmp_path / "plain")
    plain.train(5, 5)
    assert differences(weights_of(trainer.model_or_module), weights_of(plain.model)) == []


def test_a_model_that_accelerate_compiles_keeps_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    trainer = make(AccelerateTrainer, tmp_path / "run", use_ema=True, hooks=[CheckpointerHook()])
    trainer.train(5, 5)
    assert "_orig_mod" in trainer.model._modules
    saved = torch.load(os.path.join(trainer.ckpt_dir, "best.pth"), weights_only=True)
    assert saved.keys() == Net(dropout=True).state_dict().keys()


# ---------------------------------------------------------------- what 1.7's scripts do


class Folders(AccelerateTrainer):
    """Its checkpoints are folders, as diffusers writes them."""

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        folder = os.path.join(self.ckpt_dir, file_name.removesuffix(".pth"))
        os.makedirs(folder, exist_ok=True)
        torch.save(self.accelerator.unwrap_model(self.model).state_dict(), os.path.join(folder, "model.bin"))


def test_checkpoints_may_be_folders(tmp_path: Path) -> None:
    hook = CheckpointerHook(period=1, max_to_keep=2)
    trainer = make(Folders, tmp_path / "run", epochs=4, hooks=[hook])
    trainer.train(5, 5)
    assert set(os.listdir(trainer.ckpt_dir)) == {"epoch_2", "epoch_3", "latest", "best"}
    assert all(
        os.listdir(os.path.join(trainer.ckpt_dir, name)) == ["model.bin"] for name in os.listdir(trainer.ckpt_dir)
    )


class ReturnsNothing(Net):
    """Its train() forgets to return the model; one of its layers is bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 1, dtype=torch.bfloat16)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)

    def forward(self, batch: Any) -> Any:
        extra: Tensor = self.extra(batch[0].to(torch.bfloat16)).float().mean()
        return super().forward(batch) + 0.01 * extra, {"miou": 0.5}


def test_odd_models_train(tmp_path: Path) -> None:
    model = ReturnsNothing()
    before = model.extra.weight.detach().clone()
    loader: Any = DataLoader(make_batches(), batch_size=None)  # type: ignore[arg-type]
    trainer = make(AccelerateTrainer, tmp_path / "run", model=model, loader=loader, hooks=[LoggerHook()], epochs=2)
    trainer.log_param(network={"width": 8, "blocks": [1, 2, {"deep": None}]})
    trainer.train(5, 2)
    assert trainer.metric_storage["miou"].latest == 0.5
    assert model.extra.weight.dtype == torch.bfloat16
    assert not torch.equal(model.extra.weight, before)
    assert "'deep'" in Path(trainer.log_file).read_text(encoding="utf-8")


# ---------------------------------------------------------------- several optimizers


class TwoSteps(Net):
    """Its layers are trained by two optimizers, each with a loss of its own."""

    def parts(self) -> dict[str, Any]:
        return {
            "first": AdamW(self.layers[0].parameters(), lr=0.01),
            "last": AdamW(self.layers[-1].parameters(), lr=0.02),
        }


def step_by_name(trainer: Trainer, batch: Any) -> dict[str, Tensor]:
    with trainer.autocast():
        first = trainer.model(batch)
        last = trainer.model(batch) * 0.5
    trainer.update(first, "first")
    trainer.update(last, "last")
    return {"total_loss": (first + last).detach()}


class PlainByName(Trainer):
    train_one_iter = step_by_name


class AcceleratedByName(AccelerateTrainer):
    train_one_iter = step_by_name


def train_several(folder: Path, form: str, kind: str) -> dict[str, Tensor]:
    as_launched() if dist.is_initialized() else reset()
    torch.manual_seed(3)
    model = TwoSteps()
    optimizers: Any = model.parts() if form == "dict" else list(model.parts().values())
    classes = {"accelerate": (AccelerateTrainer, AcceleratedByName), "plain": (Trainer, PlainByName)}[kind]
    trainer = classes[form == "dict"](
        model, optimizers, None, make_loader(batch_size=4), 2, folder, hooks=[], seed=5, clip_grad_norm=0.5
    )
    trainer.train(5, 5)
    return weights_of(trainer.model_or_module)


@pytest.mark.parametrize("form", ["list", "dict"])
def test_several_optimizers_have_the_bits_of_the_plain_trainer(form: str, tmp_path: Path) -> None:
    ours, plain = (train_several(tmp_path / kind, form, kind) for kind in ("accelerate", "plain"))
    assert differences(ours, plain) == []
    assert differences(ours, weights_of(TwoSteps())) != []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("form", ["list", "dict"])
def test_several_optimizers_on_two_processes_equal_the_ddp_strategy(form: str, tmp_path: Path) -> None:
    ours, plain = (
        on_processes(train_several, tmp_path / kind, 2, tmp_path / kind / "run", form, kind)[1]
        for kind in ("accelerate", "plain")
    )
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- two processes


def evaluate(model: Net, batch: Any) -> dict[str, Tensor]:
    return {"error": (model.predict(batch[0]) - batch[1]).abs().squeeze(1)}


def as_launched() -> None:
    """The environment that `accelerate launch --cpu` makes, in a process whose group exists already."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    reset()


def train_on_ranks(folder: Path, kind: str, **settings: Any) -> dict[str, Any]:
    as_launched()
    torch.manual_seed(3)
    hook = EvalHook(make_loader(size=21, batch_size=4), evaluate, save_metric="error", max_first=False)
    hooks: list[Any] = [hook, CheckpointerHook()] if settings.pop("with_hooks", False) else []
    trainer_class = {"accelerate": AccelerateTrainer, "ddp": Trainer}[kind]
    given = {"hooks": hooks, **settings}
    trainer = make(trainer_class, folder, loader=make_loader(batch_size=4), model=Net(), **given)
    trainer.train(5, 5)
    assert isinstance(trainer.model, DistributedDataParallel)
    return {
        "weights": weights_of(trainer.model_or_module),
        "ema": weights_of(trainer.model_evaluate),
        "lr": trainer.lr,
        "num_hooks": len(trainer.hooks),
        "updates": trainer.progress.num_updates,
        "loss": trainer.metric_storage["total_loss"].latest,
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_two_processes_equal_the_ddp_strategy(name: str, tmp_path: Path) -> None:
    results = {
        kind: on_processes(train_on_ranks, tmp_path / kind, 2, tmp_path / kind / "run", kind, **SETTINGS[name])
        for kind in ("accelerate", "ddp")
    }
    for ours, theirs in zip(results["accelerate"], results["ddp"], strict=True):
        for part in ("weights", "ema"):
            for key, value in theirs[part].items():
                torch.testing.assert_close(ours[part][key], value, rtol=0, atol=1e-6)
        assert ours["updates"] == theirs["updates"]
    first, second = results["accelerate"]
    assert differences(first["weights"], second["weights"]) == []


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_two_processes_a_schedule_by_name_ends_with_the_run(accumulation: int, tmp_path: Path) -> None:
    results = on_processes(
        train_on_ranks,
        tmp_path,
        2,
        tmp_path / "run",
        "accelerate",
        schedule="linear",
        gradient_accumulation_steps=accumulation,
        with_hooks=True,
    )
    assert [result["lr"] for result in results] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert [result["num_hooks"] for result in results] == [2, 0], "hooks on the main process only"
    assert {"latest.pth", "best.pth"} <= set(os.listdir(tmp_path / "run" / "checkpoints"))


def train_stream(folder: Path) -> Any:
    """A stream, which accelerate splits over the processes."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(x, y) for batch in make_batches(6) for x, y in zip(*batch, strict=True)])

    as_launched()
    trainer = make(AccelerateTrainer, folder, epochs=2, loader=DataLoader(Stream(), 4), model=Net())
    trainer.train(5, 5)
    return weights_of(trainer.model_or_module), trainer.progress.iter


@pytest.mark.usefixtures("one_thread")
def test_a_stream_is_split_by_accelerate(tmp_path: Path) -> None:
    first, second = on_processes(train_stream, tmp_path, 2, tmp_path / "run")
    assert first[1] == second[1] == 6
    assert differences(first[0], second[0]) == []


def train_unseen(folder: Path) -> None:
    reset()
    make(AccelerateTrainer, folder)


def test_a_process_group_that_accelerate_does_not_see_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"process group has 2 processes, but the Accelerator sees 1.*accelerate launch"):
        on_processes(train_unseen, tmp_path, 2, tmp_path / "run")
