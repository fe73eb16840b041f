"""What scripts could do before run/ was split off from the trainer, they still can; each was broken once."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.small_runs import Net, differences, library_frames, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, HookBase, NonFiniteError, Trainer


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_trainer_is_not_copied_in_silence(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(make_trainer(tmp_path))


@pytest.mark.usefixtures("_no_collector")
def test_trainer_snapshot_and_weights_are_freed_without_the_collector(tmp_path: Path) -> None:
    def run(number: int) -> list[weakref.ref[Any]]:
        trainer = make_trainer(tmp_path / str(number), hooks=[CheckpointerHook()])
        trainer.train()
        buffers = trainer._saver._buffers
        held = [tensor for tensors in buffers._buffers.values() for tensor in tensors]
        assert held
        return [weakref.ref(thing) for thing in (trainer, trainer.model, trainer._saver, buffers, *held)]

    run(0)  # the first run of a process imports on its way
    references = run(1)
    run(2)
    assert [reference() for reference in references] == [None] * len(references)


class Raises(HookBase):
    """Raises at a stage, or when its state is asked for."""

    def __init__(self, where: str, error: BaseException) -> None:
        def fail(*arguments: Any) -> Any:
            raise error

        self.seen: list[BaseException] = []
        setattr(self, where, fail)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_exception(self, error: BaseException) -> None:
        self.seen.append(error)


@pytest.mark.parametrize("kind", [StopIteration, GeneratorExit, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize(
    "where", ["before_train", "before_epoch", "after_iter", "after_epoch", "after_train", "state_dict"]
)
def test_any_exception_comes_out_as_it_was_raised(where: str, kind: type[BaseException], tmp_path: Path) -> None:
    error = kind("mine")
    hook = Raises(where, error)
    saves = [CheckpointerHook()] if where == "state_dict" else []  # a state that nobody saves need not be there
    raised = raised_by(make_trainer(tmp_path, hooks=[hook, *saves]).train, kind)
    assert raised is error
    assert hook.seen == [error]


@pytest.mark.parametrize("kind", [StopIteration, ValueError])
def test_an_exception_of_close_comes_out_as_it_was_raised(kind: type[Exception], tmp_path: Path) -> None:
    error = kind("mine")
    assert raised_by(make_trainer(tmp_path, hooks=[Raises("close", error)]).train, kind) is error


class Broken(Net):
    """A model whose state cannot be had."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise LookupError("mine")


def test_few_frames_stand_above_an_error_in_a_models_state_dict(tmp_path: Path) -> None:
    error = raised_by(make_trainer(tmp_path, Broken(), hooks=[CheckpointerHook()]).train, LookupError)
    assert len(library_frames(error)) <= 6, library_frames(error)


def test_an_override_of_load_checkpoint_is_called_for_resume(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", hooks=[CheckpointerHook()]).train()
    path = tmp_path / "run" / "checkpoints" / "latest.pth"
    loaded: list[Any] = []

    class Own(Trainer):
        def load_checkpoint(self, path: Any = None, checkpoint: Any = None) -> Any:
            loaded.append(path)
            return super().load_checkpoint(path, checkpoint)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Own(model, optimizer, None, make_batches(), 3, tmp_path / "other", hooks=[], resume=path).train()
    assert loaded == [path]


def test_save_checkpoint_may_be_overridden_at_any_time(tmp_path: Path) -> None:
    class Own(Trainer): ...

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Own(model, optimizer, None, make_batches(), 2, tmp_path, hooks=[CheckpointerHook()])
    saved: list[str] = []
    Own.save_checkpoint = lambda self, name, single=True, print_info=False: saved.append(name)  # type: ignore[method-assign, assignment]
    trainer.train()
    assert saved == ["best.pth", "latest.pth"] * 2


def test_a_buffer_that_only_shares_a_name_with_batch_norms_may_be_infinite(tmp_path: Path) -> None:
    model = Net()
    model.register_buffer("running_var", torch.tensor(math.inf))
    make_trainer(tmp_path, model).save_checkpoint("best.pth")


def test_an_override_of_record_takes_a_steps_values(tmp_path: Path) -> None:
    class Own(Trainer):
        def record(self, values: Any) -> None:
            super().record({**values, "twice": 2 * float(values["total_loss"])})

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = Own(model, optimizer, None, make_batches(), 1, tmp_path, hooks=[])
    trainer.train()
    assert trainer.metric_storage["twice"].latest == pytest.approx(2 * trainer.metric_storage["total_loss"].latest)
    assert trainer.metric_storage["lr"].latest == 0.05


def test_a_longer_window_set_between_two_windows_is_scaled(tmp_path: Path) -> None:
    class Longer(HookBase):
        def before_epoch(self) -> None:
            if self.trainer.epoch == 1:
                self.trainer.gradient_accumulation_steps = self.trainer.updater.window_len = 3  # type: ignore[attr-defined]

    def trained(hooks: list[HookBase], epochs: list[tuple[int, int]]) -> Callable[[], Any]:
        def run() -> Any:
            model = Net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for number, (window, length) in enumerate(epochs):
                work_dir = tmp_path / f"{len(epochs)}_{number}"
                settings = {"gradient_accumulation_steps": window, "hooks": hooks}
                make_trainer(work_dir, model, optimizer, data=make_batches(6), max_epochs=length, **settings).train()
            return weights_of(model)

        return run

    assert differences(trained([Longer()], [(1, 2)])(), trained([], [(1, 1), (3, 1)])()) == []


def test_values_of_a_trainer_that_is_gone_can_be_read(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    storage = trainer.metric_storage
    storage.record(0, {"total_loss": torch.tensor(1.0), "more": torch.tensor(math.nan)})
    del trainer
    gc.collect()
    assert storage["total_loss"].latest == 1.0


def test_a_hooks_own_nonfinite_error_keeps_its_words(tmp_path: Path) -> None:
    error = NonFiniteError("mine")
    assert raised_by(make_trainer(tmp_path, hooks=[Raises("before_update", error)]).train, NonFiniteError) is error


def test_tied_weights_are_one_in_a_snapshot(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    trainer = make_trainer(tmp_path, model)
    trainer.save_checkpoint("best.pth")
    saved = torch.load(Path(trainer.ckpt_dir) / "best.pth", weights_only=True)
    assert saved["0.weight"].data_ptr() == saved["1.weight"].data_ptr()
