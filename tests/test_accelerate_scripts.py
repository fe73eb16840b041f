"""AccelerateTrainer in the scripts of accelerate's users: their Accelerators, loaders, hooks and saves.

A function that is run `on_processes` makes several short runs, for starting two processes takes longer than they do.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from tests.distributed.processes import on_processes, one_thread
from tests.small_runs import Net, differences, make_batches, weights_of
from tests.test_accelerate_trainer import _new_state, as_launched, make, make_loader, reset
from torch_frame import AccelerateTrainer, CheckpointerHook, EvalHook, HookBase, SettingError, Trainer

accelerate = pytest.importorskip("accelerate")
from accelerate.utils import (  # noqa: E402
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
)

__all__ = ["_new_state", "one_thread"]


def trained(trainer: Any) -> Any:
    trainer.train(5, 5)
    return trainer


def plain_weights(folder: Path, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return weights_of(trained(make(Trainer, folder, **settings)).model_or_module)


# ---------------------------------------------------------------- the script's Accelerator


def test_an_accelerator_of_two_trainers_keeps_its_window(tmp_path: Path) -> None:
    """Phases, or folds, with one Accelerator."""
    given = accelerate.Accelerator(gradient_accumulation_steps=4)
    windows = [trained(make(AccelerateTrainer, tmp_path / name, accelerator=given)) for name in "ab"]
    assert [trainer.gradient_accumulation_steps for trainer in windows] == [4, 4]
    given.gradient_accumulation_steps = 2
    assert make(AccelerateTrainer, tmp_path / "c", accelerator=given).gradient_accumulation_steps == 2


def test_a_window_of_the_models_accelerator_is_taken(tmp_path: Path) -> None:
    accelerate.Accelerator(gradient_accumulation_steps=4)
    assert make(AccelerateTrainer, tmp_path / "run").gradient_accumulation_steps == 4
    reset()
    accelerate.Accelerator(gradient_accumulation_steps=4)
    with pytest.raises(SettingError, match="is 2, but the accelerator's is 4"):
        make(AccelerateTrainer, tmp_path / "run", gradient_accumulation_steps=2)


def test_a_later_accelerator_does_not_divide_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All Accelerators of a process share one number of accumulation steps (accelerate 3533, transformers 40052)."""
    torch.manual_seed(3)
    trainer = make(AccelerateTrainer, tmp_path / "ours", clip_grad_norm=0.05)
    accelerate.Accelerator(gradient_accumulation_steps=4)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer.train(5, 5)
    assert caplog.text.count("gradient_accumulation_steps=4 was made after the trainer") == 1
    assert differences(weights_of(trainer.model_or_module), plain_weights(tmp_path / "p", clip_grad_norm=0.05)) == []


def test_parts_of_its_accumulation_without_effect_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer = make(
            AccelerateTrainer, tmp_path / "run", accelerator=accelerate.Accelerator(gradient_accumulation_plugin=plugin)
        )
    assert trainer.gradient_accumulation_steps == 4
    assert "sync_with_dataloader=False of the accelerator's gradient accumulation has no effect" in caplog.text


def test_its_data_seed_is_the_seed(tmp_path: Path) -> None:
    given = accelerate.Accelerator(dataloader_config=DataLoaderConfiguration(data_seed=11, use_seedable_sampler=True))
    model = Net()
    trainer = AccelerateTrainer(
        model, SGD(model.parameters(), 0.1), None, make_loader(), 1, tmp_path, accelerator=given
    )
    assert trainer.seed == 11


class SeesSync(HookBase):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def after_iter(self) -> None:
        self.seen.append(self.trainer.accelerator.sync_gradients)  # type: ignore[attr-defined]


def test_hooks_see_in_sync_gradients_whether_a_window_ends(tmp_path: Path) -> None:
    look = SeesSync()
    trained(make(AccelerateTrainer, tmp_path / "run", epochs=1, hooks=[look], gradient_accumulation_steps=2))
    assert look.seen == [False, True, False, True, True], "the epoch's last batch ends one"


class TwoOptimizers(AccelerateTrainer):
    """A GAN as accelerate's users write it: the second optimizer is prepared, and steps by itself in each batch."""

    def __init__(self, *args: Any, critic: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.critic = critic
        self.critics = SGD(critic.parameters(), 0.1)

    def prepare_model(self) -> None:
        super().prepare_model()
        self.critic, self.critics = self.accelerator.prepare(self.critic, self.critics)

    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        own = self.critic(batch)
        self.critics.zero_grad()
        self.accelerator.backward(own)
        self.critics.step()
        with self.autocast():
            loss = self.model(batch)
        self.update(loss)
        return {"total_loss": loss.detach()}


def test_an_own_prepared_optimizer_steps_in_each_batch(tmp_path: Path) -> None:
    torch.manual_seed(3)
    critic = Net()
    expected = Net()
    expected.load_state_dict(critic.state_dict())
    optimizer = SGD(expected.parameters(), 0.1)
    loader: Any = make_batches()
    for batch in loader:
        optimizer.zero_grad()
        expected(batch).backward()
        optimizer.step()
    settings = {"loader": loader, "epochs": 1, "critic": critic, "gradient_accumulation_steps": 2}
    trained(make(TwoOptimizers, tmp_path / "run", **settings))  # type: ignore[arg-type]
    assert differences(weights_of(critic), weights_of(expected)) == []


class OwnStep(AccelerateTrainer):
    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        with self.accelerator.accumulate(self.model):
            self.optimizer.zero_grad()
            loss = self.model(batch)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return {"total_loss": loss.detach()}


def test_an_own_step_is_told_what_it_leaves_out_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trained(
            make(OwnStep, tmp_path / "run", mixed_precision="bf16", gradient_accumulation_steps=2, clip_grad_norm=1.0)
        )
    assert "have no effect: gradient_accumulation_steps=2, clip_grad_norm=1." in caplog.text
    assert "precision=" not in caplog.text, "accelerate's wrapper computes the forward pass in bf16"


def test_its_folder_is_the_runs(tmp_path: Path) -> None:
    trained(make(AccelerateTrainer, tmp_path / "run"))
    reset()
    second = trained(make(AccelerateTrainer, tmp_path / "run", create_new_dir="count"))
    assert second.work_dir != str(tmp_path / "run")
    assert second.accelerator.project_dir == second.accelerator.logging_dir == second.work_dir
    reset()
    given = accelerate.Accelerator(project_dir=str(tmp_path / "own"))
    trained(make(AccelerateTrainer, tmp_path / "run", create_new_dir="count", accelerator=given))
    assert given.project_dir == str(tmp_path / "own")


def test_an_optimizer_is_in_the_state_once(tmp_path: Path) -> None:
    trainer = trained(make(AccelerateTrainer, tmp_path / "run", hooks=[CheckpointerHook()]))
    state = torch.load(os.path.join(trainer.ckpt_dir, "latest.pth"), weights_only=True)
    assert state["attributes"] == {}


class Fails(AccelerateTrainer):
    calls = 0

    def prepare_model(self) -> None:
        self.calls += 1
        if self.calls == 1:
            raise OSError("the weights are not there")
        super().prepare_model()


def test_a_prepare_model_that_failed_is_called_again(tmp_path: Path) -> None:
    trainer = make(Fails, tmp_path / "run")
    with pytest.raises(OSError, match="not there"):
        trainer.train(5, 5)
    assert trained(trainer).calls == 2


class LoadsWeights(AccelerateTrainer):
    def prepare_model(self) -> None:
        super().prepare_model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.5)


class OtherModel(AccelerateTrainer):
    """Makes the model anew, as scripts do that add adapters."""

    def prepare_model(self) -> None:
        self.model = nn.Sequential(Net())
        self.optimizer = AdamW(self.model.parameters(), lr=0.0)
        super().prepare_model()


@pytest.mark.parametrize("kind", [LoadsWeights, OtherModel])
def test_the_average_begins_with_the_prepared_weights(kind: type[AccelerateTrainer], tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.0)
    trainer = kind(model, optimizer, None, make_loader(), 1, tmp_path, use_ema=True, ema_decay=0.9999, ema_ramp=0)
    trainer.train(5, 5)
    torch.testing.assert_close(
        dict(weights_of(trainer.model_evaluate)), dict(weights_of(trainer.model_or_module)), rtol=0, atol=1e-6
    )
    saved = torch.load(os.path.join(trainer.ckpt_dir, "best.pth"), weights_only=True)
    assert saved.keys() == trainer.model_or_module.state_dict().keys()


class Quantised(Net):
    """As transformers gives it, with bitsandbytes."""

    is_loaded_in_8bit = True
    hf_device_map: dict[str, Any] = {"": torch.device("cpu")}  # noqa: RUF012

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`.to` is not supported for `4-bit` or `8-bit` bitsandbytes models.")


def test_a_model_that_refuses_to_be_moved_is_left_where_it_is(tmp_path: Path) -> None:
    trainer = trained(make(AccelerateTrainer, tmp_path / "run", model=Quantised()))
    assert trainer.progress.iter == 15


@pytest.mark.parametrize("kind", ["FSDP", "MEGATRON_LM", "XLA", "MULTI_GPU"])
def test_what_was_never_run_is_told_and_not_refused(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = accelerate.Accelerator(cpu=True)
    given.state.distributed_type = accelerate.DistributedType[kind]  # as its plugins set it on their machines
    with caplog.at_level(logging.INFO, "torch_frame"):
        make(AccelerateTrainer, tmp_path, accelerator=given)
    assert caplog.text.count(f"{kind} through Accelerate has never been run with torch-frame") == 1


# ---------------------------------------------------------------- schedules that were made for a prepared optimizer


def one_cycle(optimizer: Any) -> Any:
    return OneCycleLR(optimizer, 0.1, total_steps=15)


def sequence(optimizer: Any) -> Any:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=3), StepLR(optimizer, 4)], [5])


@pytest.mark.parametrize("schedule", [one_cycle, sequence])
def test_a_schedule_of_a_prepared_optimizer_runs_without_a_word(schedule: Callable[[Any], Any], tmp_path: Path) -> None:
    results = []
    for name in ("prepared", "plain"):
        reset()
        torch.manual_seed(3)
        model: Any = Net()
        optimizer: Any = SGD(model.parameters(), 0.1, momentum=0.9)
        given = accelerate.Accelerator()
        scheduler = None
        if name == "prepared":
            model, optimizer = given.prepare(model, optimizer)
            scheduler = given.prepare(schedule(optimizer))
        trainer = AccelerateTrainer(
            model,
            optimizer,
            scheduler or schedule(optimizer),
            make_loader(),
            3,
            tmp_path / name,
            accelerator=given,
            hooks=[],
            seed=5,
            lr_scheduler_interval="iter",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train(5, 5)
        results.append((trainer.lr, weights_of(trainer.model_or_module)))
    assert results[0][0] == results[1][0]
    assert differences(results[0][1], results[1][1]) == []


def test_a_prepared_plateau_follows_its_metric(tmp_path: Path) -> None:
    class Prepares(AccelerateTrainer):
        def prepare_model(self) -> None:
            super().prepare_model()
            self.lr_scheduler = self.accelerator.prepare(ReduceLROnPlateau(self.optimizer, **PLATEAU))

    model = Net()
    optimizer = SGD(model.parameters(), 0.1)
    trainer = Prepares(
        model,
        optimizer,
        ReduceLROnPlateau(optimizer, **PLATEAU),
        make_loader(),
        3,
        tmp_path,
        hooks=[EvalHook(make_loader(), errors)],
        lr_scheduler_metric="eval_error",
    )
    assert trained(trainer).lr == pytest.approx(0.001)


def test_an_interval_beside_a_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_frame"):
        make(AccelerateTrainer, tmp_path, schedule="linear", lr_scheduler_interval="epoch")
    assert "lr_scheduler_interval='epoch' is ignored: a schedule by name steps once an update" in caplog.text


PLATEAU: dict[str, Any] = {"patience": 0, "threshold": 10.0, "threshold_mode": "abs"}


def errors(model: Any, batch: Any) -> dict[str, Tensor]:
    return {"error": (model.predict(batch[0]) - batch[1]).abs().squeeze(1)}


# ---------------------------------------------------------------- loaders of accelerate


class Indices(Dataset[Any]):
    """Notes which samples are asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return torch.full((3,), float(index)), torch.zeros(1)


class StopsAfter(HookBase):
    """Ends the run after its second epoch, by an error, with its state saved."""

    def after_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.trainer.save_checkpoint("latest.pth", save_single_model=False)
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_orders_of_its_own_epochs(tmp_path: Path) -> None:
    """accelerate's loaders count iterations from 0 again (accelerate 3996, 4071)."""
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    given = accelerate.Accelerator(dataloader_config=configuration)

    def asked(folder: str, **settings: Any) -> list[int]:
        torch.manual_seed(3)
        data = Indices()
        loader = given.prepare(DataLoader(data, 4, shuffle=True))
        trainer = make(AccelerateTrainer, tmp_path / folder, epochs=4, accelerator=given, loader=loader, **settings)
        if settings.get("hooks"):
            with pytest.raises(KeyboardInterrupt):
                trainer.train(5, 5)
        else:
            trainer.train(5, 5)
        return data.asked

    whole = asked("whole")
    asked("parts", hooks=[StopsAfter()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = asked("parts", resume="auto")
    assert rest == whole[24:]


# ---------------------------------------------------------------- two processes


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x, y) for batch in make_batches(5) for x, y in zip(*batch, strict=True)])


class CountsBatches(HookBase):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def after_epoch(self) -> None:
        self.counts.append(self.trainer.inner_iter + 1)


class SetsLoader(HookBase):
    """Another loader from the second epoch on; `make_one(accelerator)` makes it."""

    def __init__(self, make_one: Callable[[Any], Any]) -> None:
        self.make_one = make_one

    def before_epoch(self) -> None:
        if self.trainer.epoch == 1:
            self.trainer.data_loader = self.make_one(self.trainer.accelerator)  # type: ignore[attr-defined]


def run(folder: Path, **settings: Any) -> Any:
    as_launched()
    accelerator = settings.pop("configuration", None)
    if accelerator is not None:
        settings["accelerator"] = accelerate.Accelerator(dataloader_config=accelerator)
    settings = {"loader": make_loader(batch_size=4), "model": Net(), **settings}
    torch.manual_seed(3)
    return trained(make(settings.pop("kind", AccelerateTrainer), folder, **settings))


def train_over_loaders(folder: Path) -> dict[str, Any]:
    """40 samples in batches of 4 for 2 processes: 5 batches in an epoch, 10 of half the size if batches are split."""

    def counts(name: str, make_one: Callable[[Any], Any], first: Callable[[Any], Any] | None = None) -> list[int]:
        as_launched()
        accelerator = accelerate.Accelerator()
        count = CountsBatches()
        loader = make_loader(batch_size=4) if first is None else first(accelerator)
        hooks = [SetsLoader(make_one), count]
        settings = {"hooks": hooks, "hook_only_main_gpu": False, "seed": 5, "accelerator": accelerator}
        model = Net()
        AccelerateTrainer(model, SGD(model.parameters(), 0.01), None, loader, 3, folder / name, **settings).train(5, 5)  # type: ignore[arg-type]
        return count.counts

    def prepared(accelerator: Any) -> Any:
        return accelerator.prepare(make_loader(batch_size=4))

    batches = make_batches()
    found: dict[str, Any] = {
        "split": run(folder / "1", configuration=DataLoaderConfiguration(split_batches=True)).progress.inner_iter,
        "len_split": run(folder / "2", configuration=DataLoaderConfiguration(split_batches=True)).epoch_len,
        "dispatched": type(
            run(folder / "3", configuration=DataLoaderConfiguration(dispatch_batches=True)).data_loader
        ).__name__,
        "left": run(folder / "4", take_over=False).epoch_len,
        "own": run(folder / "5", loader=batches, own_shards=True).epoch_len == len(batches),
        "plain, then prepared": counts("6", prepared),
        "prepared, then plain": counts("7", lambda accelerator: make_loader(batch_size=4), prepared),
    }
    refused: list[tuple[str, dict[str, Any]]] = [
        ("a list", {"loader": batches}),
        ("no batches", {"loader": DataLoader(batches, batch_size=None), "take_over": False}),  # type: ignore[arg-type]
    ]
    for name, settings in refused:
        try:
            run(folder / "8", **settings)
        except SettingError as error:
            found[name] = str(error)
    return found


@pytest.mark.usefixtures("one_thread")
def test_each_loader_is_split_once_on_two_processes(tmp_path: Path) -> None:
    for found in on_processes(train_over_loaders, tmp_path, 2, tmp_path / "runs"):
        assert found.pop("a list").endswith("or own_shards=True of AccelerateTrainer.")
        assert "batch_size=None, which accelerate cannot split over 2 processes" in found.pop("no batches")
        assert found == {
            "split": 0,
            "len_split": 10,
            "dispatched": "DataLoaderDispatcher",
            "left": 5,
            "own": True,
            "plain, then prepared": [5, 5, 5],
            "prepared, then plain": [5, 5, 5],
        }


def evaluate_over_loaders(folder: Path) -> dict[str, Any]:
    """How many samples each process evaluates of 21 in an epoch, and the score."""

    def evaluated(name: str, make_one: Callable[[Any], Any], configuration: Any = None, **settings: Any) -> Any:
        as_launched()
        accelerator = accelerate.Accelerator(dataloader_config=configuration)
        seen = []

        def score(model: Any, batch: Any) -> dict[str, Tensor]:
            seen.append(len(batch[0]))
            return errors(model, batch)

        model = Net()
        hook = EvalHook(make_one(accelerator), score)
        trainer = AccelerateTrainer(
            model,
            SGD(model.parameters(), 0.0),
            None,
            make_loader(batch_size=4),
            1,
            folder / name,
            accelerator=accelerator,
            hooks=[hook],
            **settings,
        )
        trainer.train(5, 5)
        return sum(seen), trainer.metric_storage["eval_error"].latest if "eval_error" in trainer.metric_storage else 0

    def sampled(accelerator: Any) -> Any:
        data = make_loader(21).dataset
        rank = accelerator.process_index
        return DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=2, rank=rank))  # type: ignore[arg-type]

    def prepared(accelerator: Any) -> Any:
        return accelerator.prepare(make_loader(21, 4))

    def stream(accelerator: Any) -> Any:
        return accelerator.prepare(DataLoader(Stream(), 4))

    dispatching, splitting = DataLoaderConfiguration(dispatch_batches=True), DataLoaderConfiguration(split_batches=True)
    plain = evaluated("0", lambda accelerator: make_loader(21, 4))
    kinds = {
        "prepared": evaluated("1", prepared),
        "dispatched": evaluated("2", prepared, dispatching),
        "split": evaluated("3", prepared, splitting),
        "sampler": evaluated("4", sampled),
        "prepared, on all": evaluated("5", prepared, hook_only_main_gpu=False),
        "stream": evaluated("6", stream),
        "stream, in shards": evaluated("7", stream, DataLoaderConfiguration(dispatch_batches=False)),
    }
    return {"plain": plain, **kinds}


@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_sees_each_sample_once_whatever_its_loader(tmp_path: Path) -> None:
    """A loader that was prepared for two processes gives one of them half of the samples, and fills the last batch up."""
    first, second = on_processes(evaluate_over_loaders, tmp_path, 2, tmp_path / "runs")
    torch.manual_seed(0)
    number = sum(len(batch[0]) for batch in make_batches(5))
    for name in ("plain", "prepared", "dispatched", "split", "sampler"):
        assert (first[name][0], second[name][0]) == (21, 0), name
    for name in ("stream", "stream, in shards"):
        assert (first[name][0], second[name][0]) == (number, 0), name
    assert first["prepared, on all"][0] + second["prepared, on all"][0] == 21


class Collects(HookBase):
    """Uses accelerate's collectives in each stage, as if all processes had this hook."""

    def use(self) -> None:
        accelerator = self.trainer.accelerator  # type: ignore[attr-defined]
        accelerator.wait_for_everyone()
        assert accelerator.gather_for_metrics(torch.ones(2)).tolist() == [1.0, 1.0]
        assert accelerate.utils.gather_object(["a"]) == ["a"]
        assert accelerator.is_main_process

    before_train = before_epoch = before_iter = after_iter = after_epoch = after_train = use
    before_update = after_update = use


class FailsInside(HookBase):
    def after_iter(self) -> None:
        assert self.trainer.accelerator.num_processes == 1  # type: ignore[attr-defined]
        raise ZeroDivisionError


class SavesItsWay(AccelerateTrainer):
    """`save_checkpoint` as diffusers' scripts write it; the trainer's own file beside it."""

    calls: list[str] = []  # noqa: RUF012

    def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
        self.calls = [*self.calls, file_name]
        self.accelerator.wait_for_everyone()
        super().save_checkpoint(file_name, save_single_model, print_info)
        folder = os.path.join(self.ckpt_dir, file_name.removesuffix(".pth"))
        os.makedirs(folder, exist_ok=True)
        torch.save(self.accelerator.get_state_dict(self.model), os.path.join(folder, "model.bin"))


class LoadsBest(HookBase):
    loaded = 0

    def after_train(self) -> None:
        report = self.trainer.load_best()  # type: ignore[attr-defined]
        self.loaded = len(report.loaded)


def use_accelerate_on_main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    trainer = run(folder / "collects", hooks=[Collects()], gradient_accumulation_steps=2)
    found["processes"] = trainer.accelerator.num_processes, str(trainer.accelerator.distributed_type.value)
    as_launched()
    failing = make(AccelerateTrainer, folder / "fails", hooks=[FailsInside()], model=Net())
    try:
        failing.train(5, 5)
    except (ZeroDivisionError, RuntimeError):
        found["after an error"] = failing.accelerator.num_processes
    trainer = run(folder / "saves", kind=SavesItsWay, hooks=[CheckpointerHook()], epochs=2)
    found["calls"] = trainer.calls
    resumed = run(folder / "saves", kind=SavesItsWay, hooks=[CheckpointerHook()], epochs=3, resume="auto")
    found["resumed"] = resumed.start_epoch, resumed.progress.iter
    as_launched()
    late = make(AccelerateTrainer, folder / "late", hooks=[CheckpointerHook()], model=Net())
    late.register_hooks([CountsBatches()])
    late.train(5, 5)
    found["hooks"] = late.registered_hook_names
    as_launched()
    model = Net()
    optimizer = SGD(model.parameters(), 0.1)
    plateau = AccelerateTrainer(
        model,
        optimizer,
        ReduceLROnPlateau(optimizer, **PLATEAU),
        make_loader(batch_size=4),
        3,
        folder / "plateau",
        hooks=[EvalHook(make_loader(21, 4), errors)],
        lr_scheduler_metric="eval_error",
    )
    found["plateau"] = trained(plateau).lr
    best = LoadsBest()
    run(folder / "best", hooks=[EvalHook(make_loader(21, 4), errors, save_metric="error", max_first=False), best])
    found["best"] = best.loaded
    return found


@pytest.mark.usefixtures("one_thread")
def test_the_main_process_uses_accelerate_alone_in_its_hooks_and_saves(tmp_path: Path) -> None:
    """`wait_for_everyone` and `gather` in them waited for ever (accelerate 2785, 2733, audiolm-pytorch 210)."""
    first, second = on_processes(use_accelerate_on_main, tmp_path, 2, tmp_path / "runs")
    assert first["processes"] == second["processes"] == (2, "MULTI_CPU")
    assert first["after an error"] == second["after an error"] == 2
    assert (first["calls"], second["calls"]) == (["best.pth", "latest.pth"] * 2, [])
    assert {"best", "best.pth", "latest", "latest.pth"} <= set(os.listdir(tmp_path / "runs" / "saves" / "checkpoints"))
    assert first["resumed"] == second["resumed"] == (2, 15)
    assert (first["hooks"], second["hooks"]) == (["CheckpointerHook", "CountsBatches"], [])
    assert (first["best"], second["best"]) == (len(Net().state_dict()), 0)
    assert first["plateau"] == second["plateau"] == pytest.approx(0.001)


class CallsMethods(Net):
    def loss(self, batch: Any) -> Any:
        return self(batch)


class ByName(AccelerateTrainer):
    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        with self.autocast():
            loss = self.model(batch)
        self.update(loss, "all")
        return {"total_loss": loss.detach()}


def other_weights(model: nn.Module, rank: int) -> nn.Module:
    """On each process."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * rank)
    return model


def wrap_models(folder: Path) -> dict[str, Any]:
    rank = int(os.environ.get("RANK", torch.distributed.get_rank()))
    as_launched()
    model = other_weights(Net(), rank)
    average = make(AccelerateTrainer, folder / "average", model=model, use_ema=True, ema_ramp=0, ema_decay=0.9999)
    average.train(5, 5)
    as_launched()
    torch.manual_seed(3)
    methods = make(
        AccelerateTrainer, folder / "methods", model=CallsMethods(), step_fn=lambda model, batch: model.loss(batch)
    )
    methods.train(5, 5)
    as_launched()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_frame").addHandler(handler)
    model = Net()
    kwargs = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
    optimizers = {"all": SGD(model.parameters(), 0.1)}
    by_name = ByName(
        model,
        optimizers,
        None,
        make_loader(batch_size=4),
        1,
        folder / "by name",
        accelerator=accelerate.Accelerator(kwargs_handlers=[kwargs]),
    )
    by_name.train(5, 5)
    return {
        "average": weights_of(average.model_evaluate),
        "methods": weights_of(methods.model_or_module),
        "told": [line for line in told if "comm_hook" in line],
    }


@pytest.mark.usefixtures("one_thread")
def test_models_of_two_processes(tmp_path: Path) -> None:
    first, second = on_processes(wrap_models, tmp_path, 2, tmp_path / "runs")
    assert differences(first["average"], second["average"]) == [], "they began with other weights"
    assert differences(first["methods"], second["methods"]) == []
    assert len(first["told"]) == 1


class ChangesAtBorders(HookBase):
    """A schedule, weights and a frozen layer of its own, on the main process."""

    def before_train(self) -> None:
        with torch.no_grad():
            self.trainer.model_or_module.layers[0].bias.fill_(0.25)  # type: ignore[operator, union-attr, index]

    def after_epoch(self) -> None:
        self.trainer.optimizer.param_groups[0]["lr"] = 0.001
        self.trainer.model_or_module.layers[0].weight.requires_grad_(False)  # type: ignore[operator, union-attr, index]


class ChangesInside(HookBase):
    def after_iter(self) -> None:
        with torch.no_grad():
            self.trainer.model_or_module.layers[0].bias.clamp_(-0.001, 0.001)  # type: ignore[operator, union-attr, index]


class LeavesItBare(AccelerateTrainer):
    def prepare_model(self) -> None:
        pass


def change_on_main(folder: Path) -> dict[str, Any]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_frame").addHandler(handler)

    def weights(name: str, kind: type[AccelerateTrainer] = AccelerateTrainer, *hooks: HookBase) -> Any:
        rank = torch.distributed.get_rank()
        as_launched()
        model = other_weights(Net(), rank)
        kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
        trainer = kind(
            model,
            SGD(model.parameters(), 0.1),
            None,
            make_loader(batch_size=4),
            3,
            folder / name,
            hooks=list(hooks),
            accelerator=accelerate.Accelerator(kwargs_handlers=[kwargs]),
            seed=5,
        )
        trainer.train(3, 5)
        return trainer.lr, weights_of(trainer.model_or_module), sum("have other weights" in line for line in told)

    return {
        "bare": weights("bare", LeavesItBare),
        "borders": weights("borders", AccelerateTrainer, ChangesAtBorders()),
        "inside": weights("inside", AccelerateTrainer, ChangesInside()),
    }


@pytest.mark.usefixtures("one_thread")
def test_what_hooks_of_the_main_process_change_all_processes_have(tmp_path: Path) -> None:
    first, second = on_processes(change_on_main, tmp_path, 2, tmp_path / "runs")
    for name in ("bare", "borders"):
        assert differences(first[name][1], second[name][1]) == [], name
        assert first[name][2] == 0
    assert first["borders"][0] == second["borders"][0] == 0.001
    assert first["inside"][2] == 1, "told, once"
