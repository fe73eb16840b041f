"""What is written is what was meant: when weights and states are copied, in which order files come, and what is told."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD

from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, CheckpointError, EvalHook, HookBase, NonFiniteError, Trainer


def load(trainer: Trainer, name: str) -> Any:
    return torch.load(os.path.join(trainer.ckpt_dir, name), weights_only=True)


def spoil(trainer: Trainer) -> None:
    """As a hook does that swaps weights in and forgets to swap them back."""
    for parameter in trainer.model.parameters():
        parameter.data.fill_(7.0)


class Scored(EvalHook):
    """Evaluates by a list of scores, and keeps the weights that it has evaluated, in no checkpoint."""

    _kept_otherwise = EvalHook._kept_otherwise | {"weights"}

    def __init__(self, scores: list[float], **settings: Any) -> None:
        super().__init__([0], lambda model, batch: {"acc": [self._score()]}, save_metric="acc", **settings)
        self.scores = scores
        self.weights: list[Any] = []

    def _score(self) -> float:
        self.weights.append(weights_of(self.trainer.model_evaluate))
        return self.scores[len(self.weights) - 1]


# ---------------------------------------------------------------- the weights that were scored


@pytest.mark.parametrize("use_ema", [False, True])
def test_weights_are_those_that_were_scored_whatever_a_later_hook_does(use_ema: bool, tmp_path: Path) -> None:
    scored = Scored([0.1, 0.2, 0.1], max_to_keep=5)  # the first one: names are found out on a batch

    def change(trainer: Trainer) -> None:
        for parameter in trainer.model_evaluate.parameters():
            parameter.data.add_(1.0)

    trainer = make_trainer(tmp_path, hooks=[scored, On(after_epoch=change)], use_ema=use_ema)
    trainer.train()
    assert differences(scored.weights[1], dict(load(trainer, "best.pth"))) == []
    assert differences(scored.weights[1], dict(load(trainer, "epoch_0.pth"))) == []
    changed = load(trainer, "latest.pth")["ema" if use_ema else "model"]
    assert differences(weights_of(trainer.model_evaluate), dict(changed["model"] if use_ema else changed)) == []


class AskInside(HookBase):
    """Asks for `asked.pth` after some batches of a window, and keeps the weights as they were after each batch."""

    def __init__(self, *batches: int) -> None:
        self._batches = batches
        self.weights: list[Any] = []

    def after_iter(self) -> None:
        self.weights.append(weights_of(self.trainer.model_or_module))
        if self.trainer.cur_iter in self._batches:
            self.trainer.save_at_safe_point("asked.pth")


def train_a_window(tmp_path: Path, hook: HookBase) -> Trainer:
    settings = {"gradient_accumulation_steps": 4, "max_epochs": 1, "data": make_batches(4)}
    trainer = make_trainer(tmp_path, Net(norm=True), hooks=[hook, CheckpointerHook(period=0)], **settings)
    trainer.train()
    return trainer


def test_weights_asked_for_inside_a_window_are_saved_as_they_were_then(tmp_path: Path) -> None:
    """A batch norm's statistics change with each batch, and the window's end comes two batches later."""
    asked = AskInside(1)
    found = dict(load(train_a_window(tmp_path, asked), "asked.pth"))
    assert differences(asked.weights[1], found) == []
    assert differences(asked.weights[2], found) != []


def test_weights_asked_for_again_before_the_safe_point_replace_those_before(tmp_path: Path) -> None:
    asked = AskInside(0, 2)
    trainer = train_a_window(tmp_path, asked)
    assert differences(asked.weights[2], dict(load(trainer, "asked.pth"))) == []
    buffers = {form[0]: len(of_form) for form, of_form in trainer._saver._buffers._buffers.items()}
    assert buffers[torch.Size((8, 3))] == 2, "one for the weights, whoever asked for them last, and one for the state"


def test_weights_are_written_by_the_job_of_the_state_that_speaks_of_them(tmp_path: Path) -> None:
    names: list[str] = []

    def audit(event: str, arguments: Any) -> None:
        if event in ("os.rename", "os.remove") and str(tmp_path) in str(arguments[0]):
            names.append(f"{event[3:]} {Path(str(arguments[-3 if event == 'os.rename' else 0])).name}")

    sys.addaudithook(audit)
    make_trainer(tmp_path, hooks=[CheckpointerHook(max_to_keep=1)]).train()
    names = [name for name in names if "remove ." not in name]
    weights, states, removals = "rename best.pth", "rename latest.pth", "remove epoch_0.pth"
    assert [name for name in names if name in (weights, states, removals)] == [
        weights,
        states,
        weights,
        states,
        removals,
    ]


# ---------------------------------------------------------------- complete, when it is said so


def test_wait_for_saves_in_a_later_hook_completes_the_weights_but_not_the_state(tmp_path: Path) -> None:
    found: list[Any] = []

    def look(trainer: Trainer) -> None:
        trainer.wait_for_saves()
        found.append(differences(weights_of(trainer.model), dict(load(trainer, "best.pth"))))
        found.append(os.path.exists(os.path.join(trainer.ckpt_dir, "latest.pth")))

    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook(max_to_keep=1), On(after_epoch=look)])
    trainer.train()
    assert found == [[], False, [], True]
    assert sorted(name for name in os.listdir(trainer.ckpt_dir) if "epoch" in name) == ["epoch_1.pth"]


def test_all_is_complete_before_after_train_and_what_is_asked_for_there_is_written(tmp_path: Path) -> None:
    found: list[Any] = []

    def look(trainer: Trainer) -> None:
        found.append(load(trainer, "latest.pth")["progress"]["epoch"])
        found.append(differences(weights_of(trainer.model), dict(load(trainer, "best.pth"))))
        spoil(trainer)
        trainer.save_at_safe_point("mine.pth")  # type: ignore[attr-defined]
        trainer.save_at_safe_point("state.pth", save_single_model=False)  # type: ignore[attr-defined]

    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook(), On(after_train=look)])
    trainer.train()
    assert found == [2, []]
    assert float(load(trainer, "mine.pth")["layers.0.bias"][0]) == 7.0
    assert float(load(trainer, "state.pth")["model"]["layers.0.bias"][0]) == 7.0


def test_an_overridden_save_checkpoint_is_called_at_once_for_weights(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Own(Trainer):
        def save_checkpoint(self, file_name: str, save_single_model: bool = True, print_info: bool = False) -> None:
            calls.append((file_name, save_single_model))

    model = Net()
    note = On(after_epoch=lambda trainer: calls.append("a later hook"))
    optimizer = SGD(model.parameters(), lr=0.05)
    Own(model, optimizer, None, make_batches(), 1, tmp_path, hooks=[CheckpointerHook(), note]).train()
    assert calls == [("best.pth", True), "a later hook", ("latest.pth", False)]


@pytest.mark.parametrize("use_ema", [False, True])
def test_load_best_puts_the_best_weights_into_the_model_and_the_average(use_ema: bool, tmp_path: Path) -> None:
    scored = Scored([0.0, 0.9, 0.1, 0.1])
    found: list[Any] = []

    def load_it(trainer: Trainer) -> None:
        report = trainer.load_best()
        found.append(report.complete)
        found.append(differences(weights_of(trainer.model), scored.weights[1]))
        found.append(differences(weights_of(trainer.model_evaluate), scored.weights[1]))

    trainer = make_trainer(tmp_path, max_epochs=3, hooks=[scored, On(after_train=load_it)], use_ema=use_ema)
    with pytest.raises(FileNotFoundError, match=r"no .*best\.pth"):
        trainer.load_best()
    trainer.train()
    assert found == [True, [], []]


# ---------------------------------------------------------------- what is not written


def test_nan_in_the_average_alone_is_not_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook()], use_ema=True)
    trainer.train()
    before = Path(trainer.ckpt_dir, "best.pth").read_bytes(), Path(trainer.ckpt_dir, "latest.pth").read_bytes()
    assert trainer.model_ema is not None
    with torch.no_grad():
        trainer.model_ema.model.layers[0].weight[0, 0] = float("nan")  # type: ignore[index, operator]
    raised_by(lambda: trainer.save_checkpoint("best.pth"), NonFiniteError)
    error = raised_by(lambda: trainer.save_checkpoint("latest.pth", save_single_model=False), NonFiniteError)
    assert "EMA's layers.0.weight" in str(error)
    after = Path(trainer.ckpt_dir, "best.pth").read_bytes(), Path(trainer.ckpt_dir, "latest.pth").read_bytes()
    assert before == after


def test_a_file_that_is_asked_for_again_is_not_removed(tmp_path: Path) -> None:
    def ask(trainer: Trainer) -> None:
        outdated = os.path.join(trainer.ckpt_dir, "mine.pth")
        trainer.save_at_safe_point("other.pth", then_remove=[outdated])  # type: ignore[attr-defined]
        trainer.save_at_safe_point("mine.pth")  # type: ignore[attr-defined]

    trainer = make_trainer(tmp_path, hooks=[On(after_epoch=ask)])
    trainer.train()
    assert {"mine.pth", "other.pth"} <= set(os.listdir(trainer.ckpt_dir))


def test_a_file_that_cannot_be_removed_is_told_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def put_in_the_way(trainer: Trainer) -> None:
        if trainer.epoch == 1:
            trainer.wait_for_saves()
            os.remove(os.path.join(trainer.ckpt_dir, "epoch_0.pth"))
            os.makedirs(os.path.join(trainer.ckpt_dir, "epoch_0.pth", "full"))

    hooks: list[HookBase] = [On(before_epoch=put_in_the_way), CheckpointerHook(max_to_keep=1)]
    make_trainer(tmp_path, hooks=hooks, max_epochs=3).train()
    assert any("epoch_0.pth" in line and "cannot be removed" in line for line in caplog.messages)


def test_a_disk_without_room_for_four_states_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(free: int) -> list[str]:
        caplog.clear()
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        make_trainer(tmp_path / str(free), hooks=[CheckpointerHook()]).train()
        return [line for line in caplog.messages if "free space" in line]

    assert len(run(100)) == 1
    assert run(10**9) == []


def test_weights_that_were_asked_for_are_written_when_a_later_hook_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(trainer: Trainer) -> None:
        raise LookupError

    scored = Scored([0.0, 0.9])
    trainer = make_trainer(tmp_path, hooks=[scored, On(after_epoch=fail)])
    raised_by(trainer.train, LookupError)
    assert differences(scored.weights[1], dict(load(trainer, "best.pth"))) == []
    assert any("not written" in line and "latest.pth" in line for line in caplog.messages)
    assert os.listdir(trainer.ckpt_dir) == ["best.pth"]


def test_weights_that_are_asked_for_in_close_are_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[On(close=lambda trainer: trainer.save_at_safe_point("mine.pth"))])
    trainer.train()
    assert differences(weights_of(trainer.model), dict(load(trainer, "mine.pth"))) == []


class AllKinds(Net):
    """Has buffers of all kinds, large enough to be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sparse", torch.eye(300).to_sparse())
        self.register_buffer("conjugate", torch.randn(9000, dtype=torch.complex64).conj())
        self.register_buffer("expanded", torch.randn(1, 9000).expand(4, 9000))
        self.register_buffer("halves", torch.randn(20000).half())
        self.register_buffer("flags", torch.ones(40000, dtype=torch.bool))
        self.register_buffer("nothing", torch.empty(0, 3))


def test_buffers_of_all_kinds_are_in_weights_and_states(tmp_path: Path) -> None:
    model = AllKinds()
    trainer = make_trainer(tmp_path, model, hooks=[CheckpointerHook(max_to_keep=2)])
    trainer.train()
    for weights in (load(trainer, "best.pth"), load(trainer, "epoch_1.pth"), load(trainer, "latest.pth")["model"]):
        for name, value in model.state_dict().items():
            saved = weights[name]
            assert torch.equal(saved.to_dense(), value.to_dense()) if value.is_sparse else torch.equal(saved, value), (
                name
            )


def test_a_folder_that_is_removed_in_mid_run_is_made_again(tmp_path: Path) -> None:
    def clean(trainer: Trainer) -> None:
        trainer.wait_for_saves()
        shutil.rmtree(trainer.ckpt_dir, ignore_errors=True)

    trainer = make_trainer(tmp_path, hooks=[CheckpointerHook(), On(before_epoch=clean)])
    trainer.train()
    assert load(trainer, "latest.pth")["progress"]["epoch"] == 2


def test_a_state_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    def block(trainer: Trainer) -> None:
        os.makedirs(os.path.join(trainer.ckpt_dir, "latest.pth"), exist_ok=True)

    trainer = make_trainer(tmp_path, hooks=[On(before_train=block), CheckpointerHook()])
    raised_by(trainer.train, CheckpointError)


# ---------------------------------------------------------------- outside train()


def test_a_save_that_is_asked_for_outside_train_is_written_at_once(tmp_path: Path) -> None:
    """No safe point will come."""
    trainer = make_trainer(tmp_path, hooks=[])
    trainer.save_at_safe_point("before.pth")
    assert differences(dict(load(trainer, "before.pth")), weights_of(trainer.model)) == []
    trainer.train()
    outdated = os.path.join(trainer.ckpt_dir, "before.pth")
    trainer.save_at_safe_point("after.pth", save_single_model=False, then_remove=[outdated])
    assert os.listdir(trainer.ckpt_dir) == ["after.pth"]
    assert load(trainer, "after.pth")["progress"]["epoch"] == 2


# ---------------------------------------------------------------- where it is written


@pytest.mark.parametrize("form", ["latest.pth", "./latest.pth", "absolute", "Path"])
def test_the_state_before_is_kept_however_latest_pth_is_named(form: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    absolute = Path(trainer.ckpt_dir, "latest.pth")
    name: Any = {"absolute": str(absolute), "Path": Path("latest.pth")}.get(form, form)
    for seed in range(2):
        trainer.progress.num_updates = seed
        trainer.save_checkpoint(name, save_single_model=False)
    found = [load(trainer, file)["progress"]["num_updates"] for file in ("previous.pth", "latest.pth")]
    assert found == [0, 1]


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    def ask(trainer: Trainer) -> None:
        trainer.save_at_safe_point("weights/of_epoch.pth")
        trainer.save_at_safe_point("states/whole.pth", save_single_model=False)
        trainer.save_at_safe_point(str(tmp_path / "elsewhere" / "copy.pth"))

    trainer = make_trainer(tmp_path / "run", hooks=[On(after_epoch=ask)])
    trainer.save_checkpoint("before/train.pth")
    trainer.train()
    places = ["weights/of_epoch.pth", "states/whole.pth", "before/train.pth", tmp_path / "elsewhere" / "copy.pth"]
    assert all(Path(trainer.ckpt_dir, place).is_file() for place in places)
