"""A hook's state goes to the hook that it is of, whatever has happened to the list of hooks; what does not fit is told."""

from __future__ import annotations

import enum
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_hooks import On, Recorder, at_iter
from tests.small_runs import CountingHook, Net, environment, make_batches, make_trainer, raised_by, run_python
from torch_frame import (
    CheckpointerHook,
    CheckpointError,
    EvalHook,
    EvalTotalHook,
    HookBase,
    LoggerHook,
    SettingError,
    ThroughputHook,
)
from torch_frame.hooks.early_stop import EarlyStoppingHook
from torch_frame.hooks.identity import identity_of
from torch_frame.metrics.metric import Metric


class Keeper(HookBase):
    """Keeps any value."""

    def __init__(self, value: Any = None, name: str = "keeper", size: int = 0) -> None:
        self.name = name
        self.size = size
        self.state = [value]

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.state[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = [state_dict["value"]]


class Stage(enum.Enum):
    WARM = 1
    COLD = 2


def scores(value: float) -> Callable[[Any, Any], dict[str, list[float]]]:
    return lambda model, batch: {"acc": [value] * len(batch[0]), "loss": [value] * len(batch[0])}


def evaluation(prefix: str, value: float = 0.5, **settings: Any) -> EvalHook:
    return EvalHook(make_batches(1), scores(value), prefix=prefix, save_last=False, progress_bar=False, **settings)


def train(folder: Path, hooks: Sequence[HookBase], epochs: int) -> Any:
    trainer = make_trainer(
        folder / "run", max_epochs=epochs, hooks=[*hooks, CheckpointerHook()], create_new_dir=None, resume="auto"
    )
    trainer.train()
    return trainer


def resumed(folder: Path, before: Sequence[HookBase], after: Sequence[HookBase]) -> Any:
    train(folder, before, 1)
    return train(folder, after, 2)


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


# ---------------------------------------------------------------- by class and identity


KEEPERS: dict[str, tuple[list[Any], list[Any], list[Any]]] = {
    # (name, size) of the hooks before, and after; the value that each has then: that of the one before with this name
    "as they were": ([("a", 1), ("b", 1)], [("a", 1), ("b", 1)], ["a", "b"]),
    "reordered": ([("a", 1), ("b", 1), ("c", 1)], [("c", 1), ("a", 1), ("b", 1)], ["c", "a", "b"]),
    "one more in front": ([("a", 1)], [("new", 1), ("a", 1)], [None, "a"]),
    "one removed": ([("a", 1), ("b", 1)], [("b", 1)], ["b"]),
    "one replaced by another": ([("a", 1), ("b", 1)], [("c", 1), ("b", 1), ("d", 1)], [None, "b", None]),
    "a setting changed": ([("a", 1)], [("a", 2)], ["a"]),
    "a setting of each changed, reordered": ([("a", 1), ("b", 2)], [("b", 3), ("a", 4)], ["b", "a"]),
}


@pytest.mark.parametrize(("before", "after", "values"), KEEPERS.values(), ids=KEEPERS)
def test_each_hook_gets_its_own_state(before: Any, after: Any, values: list[Any], tmp_path: Path) -> None:
    hooks = [Keeper(None, *settings) for settings in after]
    resumed(tmp_path, [Keeper(name, name, size) for name, size in before], hooks)
    assert [hook.state[0] for hook in hooks] == values


def test_states_that_nobody_takes_and_hooks_without_one_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    resumed(tmp_path, [Keeper(1, "a"), Keeper(2, "b")], [Keeper(3, "b"), CountingHook()])
    assert "not registered: Keeper(name='a')" in warnings_of(caplog)
    assert "begin anew: CountingHook" in caplog.text


def test_hooks_that_are_paired_by_what_agrees_most_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resumed(tmp_path, [Keeper(1, "a"), Keeper(2, "b")], [Keeper(None, "c"), Keeper(None, "d")])
    assert "Keeper(name='c') continues with the state of Keeper(name='a')" in warnings_of(caplog)


class Of(CountingHook):
    """Is made with a thing, in a dict and in a slot."""

    __slots__ = ("slot",)

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.slot = self.thing = thing
        self.best = math.nan

    def after_epoch(self) -> None:
        if self.trainer.epoch == 0:
            self.count = self.trainer.hooks.index(self)


def one() -> None: ...


def two() -> None: ...


THINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lists": (lambda: ["a", "b"], lambda: ["b", "a"]),
    "tuples of numbers": (lambda: (1, 2.5), lambda: (1, 2)),
    "sets": (lambda: {"a", "b"}, lambda: {"a", "c"}),
    "dicts": (lambda: {"layers": ["a"]}, lambda: {"layers": ["b"]}),
    "paths": (lambda: Path("a"), lambda: Path("b")),
    "enums": (lambda: Stage.WARM, lambda: Stage.COLD),
    "functions": (lambda: one, lambda: two),
    "functions with a setting": (lambda: functools.partial(one, 1), lambda: functools.partial(one, 2)),
    "classes": (lambda: int, lambda: float),
    "objects": (lambda: torch.nn.L1Loss(), lambda: torch.nn.MSELoss()),
    "objects in a list": (lambda: [torch.nn.L1Loss()], lambda: [torch.nn.MSELoss()]),
}


@pytest.mark.parametrize(("a", "b"), THINGS.values(), ids=THINGS)
def test_what_hooks_are_made_with_tells_them_apart(
    a: Callable[[], Any], b: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    after = [Of(b()), Of(a())]
    resumed(tmp_path, [Of(a()), Of(b())], after)
    assert [hook.count for hook in after] == [1, 0]
    assert warnings_of(caplog) == ""  # what is NaN is equal too


class Outer:
    class Of(Of):
        """Another class of the same name."""


def test_classes_of_one_name_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    after = [Outer.Of(1), Of(1)]
    resumed(tmp_path, [Of(1), Outer.Of(1)], after)
    assert [hook.count for hook in after] == [1, 0]
    assert warnings_of(caplog) == ""


def test_hooks_of_a_script_that_was_moved_are_told_apart_by_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, [Of(["a"]), Of(["b"])], 1)
    monkeypatch.setattr(Of, "__module__", "moved")
    after = [Of(["b"]), Of(["a"])]
    train(tmp_path, after, 2)
    assert [hook.count for hook in after] == [1, 0]
    assert warnings_of(caplog) == ""


def test_identities_are_the_same_in_each_process(tmp_path: Path) -> None:
    code = "from tests.hooks.test_caller import Of, identity_of; print(identity_of(Of({'a', 'b', ('c', None)})))"
    printed = {run_python(code, tmp_path, env=environment(PYTHONHASHSEED=seed)).stdout for seed in ("1", "2")}
    assert printed == {f"{identity_of(Of({'a', 'b', ('c', None)}))}\n"}


def test_hooks_that_nothing_tells_apart_go_by_their_order(tmp_path: Path) -> None:
    hooks = [Keeper(), Keeper()]
    resumed(tmp_path, [Keeper("first"), Keeper("second")], hooks)
    assert [hook.state[0] for hook in hooks] == ["first", "second"]


def test_a_hook_registered_after_the_load_gets_its_own_state(tmp_path: Path) -> None:
    train(tmp_path, [Keeper("a", "a"), Keeper("b", "b")], 1)
    first, second = Keeper(None, "b"), Keeper(None, "a")
    trainer = make_trainer(tmp_path / "run", hooks=[first], create_new_dir=None)
    trainer.load_checkpoint("latest.pth")
    trainer.register_hooks([second])
    assert (first.state[0], second.state[0]) == ("b", "a")


def test_states_of_version_2_go_by_class_and_order(tmp_path: Path) -> None:
    hooks = [Keeper(name="a"), Keeper(name="b")]
    trainer = make_trainer(tmp_path, hooks=hooks)
    trainer.hook_caller.load_state_dict({"Keeper": {"value": 1}, "Keeper#1": {"value": 2}})
    assert [hook.state[0] for hook in hooks] == [1, 2]


def test_an_evaluation_in_front_of_another_leaves_it_its_best(tmp_path: Path) -> None:
    test, val = evaluation("test", 0.9), evaluation("val", 0.1, save_metric="acc")
    resumed(tmp_path, [evaluation("val", 0.75, save_metric="acc")], [test, val])
    assert (val.cur_best, test.cur_best) == (0.75, float("-inf"))


def test_another_prefix_is_another_hook(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = evaluation("test", 0.1, save_metric="acc")
    resumed(tmp_path, [evaluation("val", 0.75, save_metric="acc")], [other])
    assert other.cur_best == pytest.approx(0.1)
    assert "EvalHook(prefix='val_'" in warnings_of(caplog) or "not registered: EvalHook" in warnings_of(caplog)


class Mean(Metric):
    higher_is_better = True

    def reset(self) -> None:
        self.values: list[float] = []

    def update(self, value: float) -> None:
        self.values.append(value)

    def compute(self) -> dict[str, float]:
        return {"mean": sum(self.values)}

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]

    def merge(self, other: Any) -> None:
        self.values += other.values


def total(prefix: str, value: float) -> EvalTotalHook:
    return EvalTotalHook(
        make_batches(1), Mean(), save_metric="mean", prefix=prefix, inputs=lambda model, batch: value, progress_bar=False
    )  # fmt: skip


def test_so_it_is_for_total_evaluations(tmp_path: Path) -> None:
    train(tmp_path, [total("val", 0.75)], 1)
    val, test = total("val", 0.25), EvalTotalHook(
        make_batches(1), Mean(), prefix="test", inputs=lambda model, batch: 3.0, progress_bar=False
    )  # fmt: skip
    train(tmp_path, [test, val], 2)
    assert (val.cur_best, test.cur_best) == (0.75, float("-inf"))


# ---------------------------------------------------------------- a best value belongs to a metric and its direction


BEST: dict[str, tuple[dict[str, Any], dict[str, Any], float, bool]] = {
    # settings before and after (0.75, then 0.5 is evaluated), the best value then, whether it was told
    "the same": ({"save_metric": "acc"}, {"save_metric": "acc"}, 0.75, False),
    "the other direction": ({"save_metric": "acc"}, {"save_metric": "acc", "max_first": False}, 0.5, True),
    "another metric": ({"save_metric": "acc"}, {"save_metric": "loss", "max_first": False}, 0.5, True),
    "another metric, same direction": ({"save_metric": "acc"}, {"save_metric": "loss"}, 0.5, True),
    "now there is one": ({}, {"save_metric": "loss", "max_first": False}, 0.5, True),
    "none any more": ({"save_metric": "acc"}, {}, float("-inf"), False),
}


@pytest.mark.parametrize(("before", "after", "best", "told"), BEST.values(), ids=BEST)
def test_a_best_value_belongs_to_a_metric_and_its_direction(
    before: Any, after: Any, best: float, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = evaluation("eval", 0.5, **after)
    resumed(tmp_path, [evaluation("eval", 0.75, **before)], [hook])
    assert hook.cur_best == best
    assert ("begins anew" in warnings_of(caplog)) == told


def test_files_that_are_kept_are_known_under_another_metric_too(tmp_path: Path) -> None:
    hook = evaluation("eval", 0.5, save_metric="loss", max_first=False, max_to_keep=1)
    trainer = resumed(tmp_path, [evaluation("eval", 0.75, save_metric="acc", max_to_keep=1)], [hook])
    kept = sorted(name for name in os.listdir(trainer.ckpt_dir) if name.startswith("epoch_"))
    assert kept == ["epoch_1.pth"]


@pytest.mark.parametrize("after", [{"metric": "eval_loss"}, {"metric": "eval_acc", "max_first": False}])
def test_early_stopping_begins_anew_for_another_metric_or_direction(
    after: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStoppingHook(**after)
    resumed(tmp_path, [evaluation("eval", 0.75), EarlyStoppingHook("eval_acc")], [evaluation("eval", 0.5), stopping])
    assert (stopping.best, stopping.num_bad_epochs) == (0.5, 0)
    assert "not registered: EarlyStoppingHook(metric='eval_acc')" in warnings_of(caplog)


def test_early_stopping_with_another_patience_goes_on(tmp_path: Path) -> None:
    stopping = EarlyStoppingHook("eval_acc", patience=7)
    resumed(tmp_path, [evaluation("eval", 0.75), EarlyStoppingHook("eval_acc")], [evaluation("eval", 0.5), stopping])
    assert (stopping.best, stopping.num_bad_epochs) == (0.75, 1)


# ---------------------------------------------------------------- a followed metric may come later


def test_a_followed_metric_may_come_after_some_epochs(tmp_path: Path) -> None:
    hooks = [evaluation("eval", period=3), EarlyStoppingHook("eval_acc"), CheckpointerHook(save_metric="eval_acc")]
    trainer = make_trainer(tmp_path / "run", max_epochs=4, hooks=hooks)
    trainer.train()
    assert hooks[2].cur_best == 0.5
    assert (Path(trainer.ckpt_dir) / "best.pth").exists()


class Late(HookBase):
    """Might log something."""


def test_one_that_never_comes_is_a_warning_after_the_last_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path / "run", max_epochs=3, hooks=[Late(), EarlyStoppingHook("a"), CheckpointerHook(save_metric="b")]
    )
    trainer.train()
    assert warnings_of(caplog).count("nothing has been logged under this name") == 2
    assert "follows 'a'" in warnings_of(caplog)
    assert "save_metric is 'b'" in warnings_of(caplog)


# ---------------------------------------------------------------- one hook, one run


@pytest.mark.parametrize("make", [CheckpointerHook, LoggerHook, CountingHook, lambda: evaluation("eval")])
def test_a_hook_of_a_run_that_has_begun_is_refused(make: Callable[[], HookBase], tmp_path: Path) -> None:
    hook = make()
    first = make_trainer(tmp_path / "first", hooks=[hook])
    first.train()
    with pytest.raises(SettingError, match="Make a new one"):
        make_trainer(tmp_path / "second", hooks=[hook])
    assert hook.trainer.work_dir == first.work_dir
    first.max_epochs += 1
    first.train()


def test_a_hook_whose_run_has_not_begun_moves_over(tmp_path: Path) -> None:
    hook = CheckpointerHook()
    first = make_trainer(tmp_path / "first", hooks=[hook])
    second = make_trainer(tmp_path / "second", hooks=[hook])
    second.train()
    assert (Path(second.ckpt_dir) / "latest.pth").exists()
    assert not (Path(first.ckpt_dir) / "latest.pth").exists()


def test_a_hook_of_a_run_that_failed_in_before_train_is_refused(tmp_path: Path) -> None:
    hook = CountingHook()
    trainer = make_trainer(tmp_path / "first", hooks=[hook, On(before_train=lambda trainer: 1 / 0)])
    raised_by(trainer.train, ZeroDivisionError)
    with pytest.raises(SettingError, match="CountingHook"):
        make_trainer(tmp_path / "second", hooks=[hook])


# ---------------------------------------------------------------- values of any kind


def test_a_state_of_any_kind_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"a": np.arange(3), "stage": Stage.WARM, "seen": {(1, b"x")}, "at": Path("a"), 3: (np.float32(1), [None])}
    hook = Keeper()
    trainer = resumed(tmp_path, [Keeper(value)], [hook])
    came = hook.state[0]
    assert came.keys() == value.keys()
    assert [type(item) for item in came.values()] == [type(item) for item in value.values()]
    assert came["a"].tolist() == [0, 1, 2]
    assert (came["stage"], came["seen"], came["at"], came[3]) == (Stage.WARM, {(1, b"x")}, Path("a"), (1, [None]))
    assert "value" in torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)["hooks"]["Keeper"]


def test_a_tensor_of_a_state_is_a_tensor_in_the_file(tmp_path: Path) -> None:
    trainer = train(tmp_path, [Keeper(torch.ones(2))], 1)
    saved = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)["hooks"]["Keeper"]
    assert torch.equal(saved["value"], torch.ones(2))


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", hooks=[Keeper({"net": [object()]})])
    with pytest.raises(CheckpointError, match=r"the state of Keeper\['value'\]\['net'\]\[0\] is a builtins.object"):
        trainer.train()
    assert trainer.progress.iter == 0


class Ready(CountingHook):
    """Its state is complete after the first step only."""

    def after_iter(self) -> None:
        self.seen = self.trainer.cur_iter

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen}


def test_a_state_that_is_complete_after_the_first_step_only_is_saved(tmp_path: Path) -> None:
    trainer = train(tmp_path, [Ready()], 1)
    assert torch.load(f"{trainer.ckpt_dir}/latest.pth")["hooks"]["Ready"]["seen"] == 4


class ReadyLater(CountingHook):
    """Its state is complete after the first epoch only."""

    def after_epoch(self) -> None:
        super().after_epoch()
        self.seen = self.trainer.epoch

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seen": self.seen}


def test_a_state_that_is_complete_after_the_first_epoch_only_is_saved(tmp_path: Path) -> None:
    trainer = train(tmp_path, [ReadyLater()], 1)
    assert torch.load(f"{trainer.ckpt_dir}/latest.pth")["hooks"]["ReadyLater"] == {"count": 1, "seen": 0}


def test_a_value_of_a_class_that_is_gone_is_refused_and_nothing_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, [Keeper(Stage.WARM)], 1)
    monkeypatch.delattr(__import__(__name__, fromlist=["Stage"]), "Stage")
    trainer = make_trainer(tmp_path / "run", hooks=[Keeper()], create_new_dir=None)
    with pytest.raises(CheckpointError, match=r"Keeper: .*Stage.*no module that is loaded has it"):
        trainer.load_checkpoint("latest.pth")
    assert trainer.progress.iter == 0


# ---------------------------------------------------------------- attributes of subclasses


class Saver(CheckpointerHook):
    def __init__(self, threshold: float = 0.5, **settings: Any) -> None:
        super().__init__(save_last=False, **settings)
        self.threshold = threshold
        self.epochs: list[int] = []
        self.names: dict[int, Any] = {}
        self.array = np.zeros(2)
        self.table: Any = None

    def after_epoch(self) -> None:
        self.epochs.append(self.trainer.epoch)
        self.names[self.trainer.epoch] = Stage.WARM
        self.array += 1
        super().after_epoch()


class Evaluator(EvalHook):
    def __init__(self) -> None:
        super().__init__(make_batches(1), scores(0.5), save_last=False, progress_bar=False)
        self.threshold = 0.5
        self.epochs: list[int] = []
        self.names: dict[int, Any] = {}
        self.array = np.zeros(2)
        self.model_of_the_user = torch.nn.Linear(1, 1)

    def after_epoch(self) -> None:
        self.epochs.append(self.trainer.epoch)
        self.names[self.trainer.epoch] = Stage.WARM
        self.array = self.array + 1
        super().after_epoch()


@pytest.mark.parametrize("make", [Saver, Evaluator])
def test_attributes_that_have_changed_resume(make: Any, tmp_path: Path) -> None:
    hook = make()
    resumed(tmp_path, [make()], [hook])
    assert hook.epochs == [0, 1]
    assert hook.names == {0: Stage.WARM, 1: Stage.WARM}
    assert hook.array.tolist() == [2, 2]


class Slotted(CheckpointerHook):
    __slots__ = ("__own", "count")

    def __init__(self) -> None:
        super().__init__(save_last=False)
        self.count = self.__own = 0

    def after_epoch(self) -> None:
        self.count += 1
        self.__own += 2

    @property
    def counts(self) -> tuple[int, int]:
        return self.count, self.__own


def test_attributes_in_slots_resume_and_are_put_back(tmp_path: Path) -> None:
    hook = Slotted()
    resumed(tmp_path, [Slotted()], [hook])
    assert hook.counts == (2, 4)
    hook = Slotted()
    trainer = make_trainer(tmp_path / "run", Net(norm=True), hooks=[hook, CheckpointerHook()], create_new_dir=None)
    with pytest.raises(CheckpointError):
        trainer.load_checkpoint("latest.pth")
    assert hook.counts == (0, 0)


def test_attributes_resume_twice(tmp_path: Path) -> None:
    for epochs in (1, 2, 3):
        hook = Saver()
        train(tmp_path, [hook], epochs)
    assert hook.epochs == [0, 1, 2]


def test_an_attribute_that_has_not_changed_is_the_scripts(tmp_path: Path) -> None:
    hook = Saver(threshold=0.7, period=2)
    trainer = resumed(tmp_path, [Saver(threshold=0.5)], [hook])
    assert (hook.threshold, hook._period) == (0.7, 2)
    saved = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)["hooks"]
    assert sorted(saved["Saver"]["attributes"]) == ["array", "epochs", "names"]
    assert "attributes" not in saved["CheckpointerHook"]


def test_an_attribute_that_cannot_be_saved_is_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hook = Saver()
    change = On(after_epoch=lambda trainer: setattr(hook, "table", [object()]))
    train(tmp_path, [change, hook, Evaluator()], 2)
    assert warnings_of(caplog).count("Saver.table is not in the checkpoint: table[0] is a builtins.object") == 1
    assert (
        "Not in the checkpoints, because they hold more than plain values: model_of_the_user of Evaluator"
        in caplog.text
    )


class OwnState(Saver):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "more": {1}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.more = state_dict["more"]


def test_a_subclass_with_a_state_of_its_own_has_both(tmp_path: Path) -> None:
    hook = OwnState()
    resumed(tmp_path, [OwnState()], [hook])
    assert (hook.more, hook.epochs) == ({1}, [0, 1])


class Collector(EvalHook):
    """As in 1.7's scripts: keeps what each evaluation gave, under names that other hooks of ours use."""

    def __init__(self) -> None:
        super().__init__(make_batches(1), scores(0.5), save_last=False, progress_bar=False)
        self.results: list[float] = []
        self.pictures: dict[int, float] = {}

    def _do_eval(self) -> None:
        super()._do_eval()
        value = self.metric_storage["eval_acc"].latest
        self.results.append(value)
        self.pictures[self.trainer.epoch] = value


def test_attributes_with_the_names_of_another_hooks_resume(tmp_path: Path) -> None:
    hook = Collector()
    resumed(tmp_path, [Collector()], [hook])
    assert hook.results == [0.5, 0.5]
    assert hook.pictures == {0: 0.5, 1: 0.5}


class KeepsElsewhere(CheckpointerHook):
    """A save_model of 1.7's kind that keeps the last two files in a folder of its own, by their paths."""

    def __init__(self) -> None:
        super().__init__(max_to_keep=2, save_last=False)

    def save_model(self) -> None:
        path = Path(self.trainer.work_dir, f"head_{self.trainer.epoch}.pth")
        torch.save(self.trainer.model.state_dict(), path)
        self._recent_checkpoints.append(str(path))
        if len(self._recent_checkpoints) > 2:
            Path(self._recent_checkpoints.pop(0)).unlink()


def test_files_that_a_save_model_keeps_in_its_own_way_are_noted_as_they_were(tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "run", hooks=[KeepsElsewhere(), CheckpointerHook()], max_epochs=3)
    first.train()
    second = make_trainer(
        tmp_path / "run", hooks=[KeepsElsewhere(), CheckpointerHook()], max_epochs=4, create_new_dir=None, resume="auto"
    )
    second.train()
    assert sorted(path.name for path in (tmp_path / "run").glob("head_*")) == ["head_2.pth", "head_3.pth"]


# ---------------------------------------------------------------- hooks that come when the run has begun


def test_a_hook_registered_in_before_train_is_one_of_the_run(tmp_path: Path) -> None:
    calls: list[str] = []
    late = On(**{stage: lambda t, stage=stage: calls.append(stage) for stage in ("before_train", "after_epoch")})
    late.check = lambda: calls.append("check")  # type: ignore[method-assign]
    make_trainer(
        tmp_path / "first", max_epochs=1, hooks=[On(before_train=lambda t: t.register_hooks([late])), LoggerHook()]
    ).train()
    assert calls == ["check", "before_train", "after_epoch"]
    with pytest.raises(SettingError, match="Make a new one"):
        make_trainer(tmp_path / "second", hooks=[late])


def test_what_is_wrong_with_it_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    for wrong in (LoggerHook(), ThroughputHook()):
        trainer = make_trainer(
            tmp_path, hooks=[On(before_train=lambda t, wrong=wrong: t.register_hooks([wrong])), LoggerHook()]
        )
        with pytest.raises(SettingError, match=wrong.class_name):
            trainer.train()
        assert trainer.progress.iter == 0


def test_a_hook_that_misses_its_before_train_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    late: list[HookBase] = [CheckpointerHook(every_n_minutes=1), Recorder(lambda trainer: trainer.cur_iter)]
    add = at_iter(1, lambda trainer: trainer.register_hooks(late))
    make_trainer(tmp_path, hooks=[On(after_iter=add)], max_epochs=1).train()
    assert "CheckpointerHook is registered when the run has begun: its before_train is not called" in caplog.text
    assert "Recorder" not in caplog.text  # it has none
    assert late[1].values == [1, 2, 3, 4]  # type: ignore[attr-defined]


def test_between_two_trains_hooks_come_as_before_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.train()
    trainer.max_epochs = 2
    trainer.register_hooks([ThroughputHook(), LoggerHook(progress_bar=False)])
    trainer.train()
    assert "its before_train" not in caplog.text
    assert "batches_per_s" in trainer.metric_storage


def test_the_list_of_hooks_cannot_be_changed_behind_the_runs_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(AttributeError):
        trainer.hooks.append(CheckpointerHook())  # type: ignore[attr-defined]


class SavesAllAttributes(HookBase):
    """As 1.7's own hooks did, and those of its users."""

    def __init__(self) -> None:
        self.count = 0

    def after_epoch(self) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "trainer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def test_a_hook_that_saves_all_its_attributes_resumes(tmp_path: Path) -> None:
    hook = SavesAllAttributes()
    trainer = resumed(tmp_path, [SavesAllAttributes()], [hook])
    assert hook.count == 2
    trainer.max_epochs = 3
    trainer.train()
    assert hook.count == 3
    with pytest.raises(SettingError, match="Make a new one"):
        make_trainer(tmp_path / "second", hooks=[hook])


@pytest.mark.parametrize("others", [[], [ThroughputHook]])
def test_a_method_that_is_put_on_a_registered_hook_is_called(others: list[Any], tmp_path: Path) -> None:
    hook, seen = HookBase(), []
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[hook, *(make() for make in others)])
    hook.after_iter = lambda: seen.append(hook.trainer.cur_iter)  # type: ignore[method-assign]
    trainer.train()
    assert seen == [0, 1, 2, 3, 4]
