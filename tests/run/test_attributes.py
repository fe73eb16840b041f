"""What a script puts on its trainer resumes with the run: optimizers, schedules, scalers, modules, and what is registered."""

from __future__ import annotations

import dataclasses
import gc
import logging
import re
import types
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, ReduceLROnPlateau

from tests.small_hooks import On, at_iter
from tests.small_runs import UserError, copied, differences, fail, library_frames, raised_by
from torch_frame import EMA, CheckpointerHook, CheckpointError, SettingError, Trainer
from torch_frame.checkpoint.values import MARK

EPOCHS, BATCHES = 4, 5


class Queue:
    """Features of the last batches: an object with a state of several kinds."""

    def __init__(self) -> None:
        self.rows = torch.zeros(8, 2)
        self.at = 0
        self.seen: set[int] = set()

    def put(self, row: Tensor) -> None:
        self.rows[self.at % 8] = row
        self.at += 1
        self.seen.add(self.at)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "at": self.at, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.at, self.seen = state["rows"].clone(), state["at"], state["seen"]


def teach(trainer: Any) -> None:
    """A momentum teacher, as most of them are written: past the tensor's version counter."""
    for old, new in zip(trainer.teacher.parameters(), trainer.model["g"].parameters(), strict=True):
        old.data = old.data * 0.9 + new.data * 0.1


class Gan(Trainer):
    """Generator and discriminator, everything but the generator's optimizer an attribute."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.opt_d = Adam(self.model["d"].parameters(), lr=0.01)
        self.schedules = {"d": ExponentialLR(self.opt_d, 0.9), "plateau": ReduceLROnPlateau(self.opt_d, patience=1)}
        self.scalers = [torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)]
        self.teacher = nn.Linear(2, 2)
        self.frozen = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(),)
        self.average = EMA(self.model["d"], 0.9)
        self.queue = Queue()
        self.number = 3

    def train_one_iter(self, batch: Any) -> dict[str, Any]:
        g, d = self.model["g"], self.model["d"]
        fake = g(batch) + 0.1 * torch.randn(batch.shape)
        d_loss = d(fake.detach()).square().mean() + (d(batch) - 1).square().mean()
        self.opt_d.zero_grad()
        self.scalers[0].scale(d_loss).backward()
        self.scalers[0].step(self.opt_d)
        self.scalers[0].update()
        distance = (fake - self.teacher(batch)).square().mean() + (fake - self.queue.rows.mean(0)).square().mean()
        g_loss = (d(fake) - 1).square().mean() + distance + 0.1 * self.frozen[0](fake).square().mean()
        self.optimizer.zero_grad()
        g_loss.backward()
        self.optimizer.step()
        self.average.update(d)
        self.queue.put(fake.detach()[0])
        self.schedules["d"].step()
        self.schedules["plateau"].step(g_loss.item())
        teach(self)
        return {"total_loss": g_loss, "d_loss": d_loss}


def build(folder: Path, epochs: int = EPOCHS, seed: int = 0, kind: type[Gan] = Gan, **settings: Any) -> Gan:
    """A trainer; its frozen net is that of a file, all else is of `seed`."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)})
    data = list(torch.randn(BATCHES, 4, 2, generator=torch.Generator().manual_seed(2)))
    settings = {"hooks": [CheckpointerHook(every_n_iters=1)], "create_new_dir": None, "resume": "auto", **settings}
    trainer = kind(model, Adam(model["g"].parameters(), lr=0.01), None, data, epochs, folder, **settings)
    with torch.no_grad():
        for parameter in trainer.frozen[0].parameters():
            parameter.fill_(0.5)
    return trainer


def outcome(trainer: Gan) -> dict[str, Any]:
    return copied(
        {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "opt_d": trainer.opt_d.state_dict(),
            "schedules": {name: schedule.state_dict() for name, schedule in trainer.schedules.items()},
            "scaler": trainer.scalers[0].state_dict(),
            "teacher": trainer.teacher.state_dict(),
            "frozen": trainer.frozen[0].state_dict(),
            "average": trainer.average.state_dict(),
            "queue": [trainer.queue.rows, trainer.queue.at, sorted(trainer.queue.seen)],
        }
    )


class Stopped(Exception):
    pass


def stop(trainer: Any) -> None:
    raise Stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = build(tmp_path_factory.mktemp("whole") / "run")
    trainer.train()
    return outcome(trainer)


def test_a_resume_after_an_epoch_is_bitwise(whole: dict[str, Any], tmp_path: Path) -> None:
    for seed, epochs in enumerate((1, 2, EPOCHS)):
        trainer = build(tmp_path / "run", epochs, seed)
        trainer.train()
    assert differences(whole, outcome(trainer)) == []


@pytest.mark.parametrize("iter", [2, 7, 12])
def test_a_resume_inside_an_epoch_is_bitwise(iter: int, whole: dict[str, Any], tmp_path: Path) -> None:
    first = build(tmp_path / "run", hooks=[CheckpointerHook(every_n_iters=1), On(before_iter=at_iter(iter, stop))])
    raised_by(first.train, Stopped)
    second, began_at = build(tmp_path / "run", seed=1), []
    second.register_hooks([On(before_train=lambda trainer: began_at.append(trainer.progress.iter))])
    second.train()
    assert began_at == [iter]
    assert differences(whole, outcome(second)) == []


def test_without_it_the_resume_would_not_be_bitwise(whole: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "run", 2).train()
    trainer = build(tmp_path / "run", seed=0)
    trainer._run.attributes.load_state_dict = lambda states: None  # type: ignore[method-assign]
    trainer.train()
    changed = {re.split(r"\W+", line)[1] for line in differences(whole, outcome(trainer))}
    assert {"model", "opt_d", "scaler", "average", "queue", "teacher", "schedules"} <= changed


def saved(trainer: Trainer) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)
    return state["attributes"]


def test_what_is_in_the_state(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.train()
    attributes = saved(trainer)
    assert set(attributes) == {
        *("opt_d", "schedules['d']", "schedules['plateau']", "scalers[0]", "teacher", "frozen[0]", "average", "queue"),
    }
    assert torch.equal(attributes["teacher"]["weight"], trainer.teacher.weight)


# ---------------------------------------------------------------- modules that no optimizer trains


def test_a_module_that_does_not_change_is_not_written(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.train()
    assert saved(trainer)["frozen[0]"][MARK] == "unchanged_module"
    trainer = build(tmp_path / "run", 2)
    trainer.train()
    assert saved(trainer)["frozen[0]"][MARK] == "unchanged_module"


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda net: net[0].weight.detach().mul_(2),
    "past the version counter": lambda net: net[0].weight.data.mul_(2),
    "other data": lambda net: setattr(net[0].weight, "data", net[0].weight.data * 2),
    "another parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach() * 2)),
    "a buffer": lambda net: net[1].running_mean.add_(1),
    "a counter": lambda net: net[1].num_batches_tracked.add_(1),
    "one element": lambda net: net[0].weight.data[1, 1].add_(1e-6),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_that_has_changed_is_written_and_restored(change: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    once = On(after_iter=at_iter(2, lambda trainer: change(trainer.frozen[0])))
    trainer = build(tmp_path / "run", 1, hooks=[once, CheckpointerHook()])
    trainer.train()
    expected = copied(trainer.frozen[0].state_dict())
    for epochs in (2, 3):  # it stays in
        trainer = build(tmp_path / "run", epochs)
        trainer.train()
        assert differences(expected, dict(trainer.frozen[0].state_dict())) == []


def test_other_weights_of_one_that_was_not_written_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "run", 1).train()
    trainer = build(tmp_path / "run", 2)
    trainer.frozen[0][0].weight.data.add_(1)
    trainer.train()
    assert "trainer.frozen[0] has other weights than in the run that is resumed" in warnings_of(caplog)


def test_a_module_with_more_than_tensors_is_written(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        count = 0

        def get_extra_state(self) -> Any:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    for epochs in (1, 2):
        trainer = build(tmp_path / "run", epochs)
        trainer.extra = Extra(1, 1)
        hook = On(after_epoch=lambda trainer: setattr(trainer.extra, "count", trainer.extra.count + 1))
        trainer.hook_caller.add([hook])
        hook.trainer = trainer
        trainer.hook_caller.hooks.reverse()  # before the CheckpointerHook
        trainer.train()
    assert trainer.extra.count == 2


def test_a_lazy_layer_is_written_once_it_has_values(tmp_path: Path) -> None:
    expected = None
    for epochs in (1, 2):
        trainer = build(tmp_path / "run", epochs)
        trainer.lazy = nn.LazyLinear(3)
        trainer.register_hooks([On(after_iter=lambda trainer: trainer.lazy(torch.zeros(1, 2)))])
        trainer.train()
        expected = expected or copied(trainer.lazy.state_dict())
    assert differences(expected, dict(trainer.lazy.state_dict())) == []


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Linear(2, 3, device="meta")])
def test_a_module_without_values_is_left_out_with_a_line(
    make: Callable[[], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path / "run", 2)
    trainer.empty = make()
    trainer.train()
    assert warnings_of(caplog).count("trainer.empty is not in the checkpoint") == 1


# ---------------------------------------------------------------- what is the trainer's own is not stored twice


def test_what_is_saved_elsewhere_is_left_out(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1, use_ema=True)
    trainer.same_model, trainer.part, trainer.parts = trainer.model, trainer.model["d"], [trainer.model["g"]]
    trainer.same_optimizer, trainer.same_ema, trainer.average_model = (
        trainer.optimizer,
        trainer.model_ema,
        trainer.model_ema.model,
    )
    trainer.warm_up, trainer.twice, trainer.opt_d_too = trainer.lr_scheduler, trainer.queue, trainer.opt_d
    trainer.register("registered", trainer.queue)
    trainer.train()
    assert set(saved(trainer)) == {
        *(
            "opt_d",
            "schedules['d']",
            "schedules['plateau']",
            "scalers[0]",
            "teacher",
            "frozen[0]",
            "average",
            "registered",
        ),
    }


# ---------------------------------------------------------------- on one side only


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_what_is_on_one_side_only_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "run", 1).train()
    assert warnings_of(caplog) == ""
    trainer = build(tmp_path / "run", 2)
    trainer.other = trainer.queue
    del trainer.queue
    trainer.queue = property(lambda self: self.other)
    type(trainer).queue = None
    del type(trainer).queue
    trainer.register("more", Queue())
    trainer.train_one_iter = lambda batch: {"total_loss": batch.sum()}  # type: ignore[method-assign]
    trainer.train()
    assert "holds the state of queue, which this trainer has neither" in warnings_of(caplog)
    assert "holds no state of 'more', trainer.other: begun anew" in warnings_of(caplog)


def test_a_state_of_before_is_taken_and_what_it_lacks_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer._run.attributes.load_state_dict(None)
    trainer.train()
    assert "holds no state of trainer.opt_d" in warnings_of(caplog)
    assert "frozen" not in warnings_of(caplog)


def test_an_attribute_made_in_before_train_gets_its_state(tmp_path: Path) -> None:
    class Late(Gan):
        def late(self) -> None:
            self.late_queue = Queue()
            self.register("registered", Queue())

    counts = []
    for epochs in (1, 2):
        trainer = build(tmp_path / "run", epochs)
        trainer.__class__ = Late
        hook = On(
            before_train=lambda trainer: trainer.late(),
            after_epoch=lambda trainer: trainer.late_queue.put(torch.ones(2)),
        )
        trainer.register_hooks([hook])
        trainer.hook_caller.hooks.reverse()
        trainer.hook_caller.stages["after_epoch"].reverse()
        trainer.train()
        counts.append(trainer.late_queue.at)
    assert counts == [1, 2]


def test_another_shape_is_refused_and_nothing_has_changed(tmp_path: Path) -> None:
    build(tmp_path / "run", 1).train()
    trainer = build(tmp_path / "run", resume=None)
    trainer.teacher = nn.Linear(2, 3)
    trainer.opt_d = Adam(list(trainer.model["d"].parameters())[:1], lr=0.01)
    before = copied(trainer.model.state_dict())
    with pytest.raises(CheckpointError, match=r"trainer.teacher: weight was \[2, 2\], now it is \[3, 2\]") as raised:
        trainer.load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pth")
    assert "trainer.opt_d: " in str(raised.value)
    assert differences(before, copied(trainer.model.state_dict())) == []


def test_something_else_under_a_name_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "run", 1).train()
    trainer = build(tmp_path / "run", resume=None)
    trainer.queue, trainer.opt_d = trainer.opt_d, trainer.queue
    with pytest.raises(CheckpointError, match=r"trainer.queue: .*something else"):
        trainer.load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pth")


# ---------------------------------------------------------------- register


def test_what_is_registered_resumes(tmp_path: Path) -> None:
    rows = {}
    for name, epochs in [("whole", 3), ("parts", 1), ("parts", 3)]:
        trainer, queue = build(tmp_path / name, epochs), Queue()
        trainer.register("mine", queue)
        trainer.register_hooks([On(after_iter=lambda trainer, queue=queue: queue.put(torch.rand(2)))])
        trainer.train()
        rows[name] = [queue.rows, queue.at, sorted(queue.seen)]
    assert differences(rows["whole"], rows["parts"]) == []


def test_a_frozen_module_that_is_registered_is_written(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.register("net", trainer.frozen[0])
    trainer.train()
    assert "0.weight" in saved(trainer)["net"]


def test_one_registered_after_the_load_gets_its_state(tmp_path: Path) -> None:
    trainer, queue = build(tmp_path / "run", 1), Queue()
    trainer.register("mine", queue)
    queue.put(torch.ones(2))
    trainer.train()
    trainer, queue = build(tmp_path / "run", 1), Queue()
    trainer.load_checkpoint("latest.pth")
    trainer.register("mine", queue)
    assert queue.at == 1


class Lacking:
    def state_dict(self) -> dict[str, Any]:
        return {}


WRONG: dict[str, tuple[Callable[[Trainer], Any], type[Exception], str]] = {
    "no load_state_dict": (lambda t: t.register("a", Lacking()), TypeError, r"a Lacking without load_state_dict\(\)"),
    "a number": (lambda t: t.register("a", 3), TypeError, "a int without state_dict"),
    "a class": (lambda t: t.register("a", Queue), TypeError, "the class Queue"),
    "no name": (lambda t: t.register("", Queue()), TypeError, "not empty"),
    "a name that is no text": (lambda t: t.register(3, Queue()), TypeError, "has to be a text"),
    "a name twice": (lambda t: [t.register("a", Queue()), t.register("a", Queue())], SettingError, "this name is taken"),
    "an attribute's name": (lambda t: [t.register("teacher", Queue()), t.train()], SettingError, "two objects with one name"),
    "too late": (lambda t: [t.train(), t.register("a", Queue())], SettingError, "after training had begun"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_told(
    call: Callable[[Trainer], Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        call(build(tmp_path / "run", 1))


class Odd(Queue):
    def state_dict(self) -> dict[str, Any]:
        return {"thing": [object()]}


def test_a_registered_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.register("odd", Odd())
    with pytest.raises(CheckpointError, match=r"the state of 'odd'\['thing'\]\[0\] is a builtins.object"):
        trainer.train()
    assert trainer.progress.iter == 0


def test_an_attributes_state_that_cannot_be_saved_is_left_out_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(tmp_path / "run", 2)
    trainer.odd = Odd()
    trainer.train()
    assert warnings_of(caplog).count("trainer.odd is not in the checkpoint") == 1
    assert "odd" not in saved(trainer)


# ---------------------------------------------------------------- what has no state


class Counting(Gan):
    """Keeps plain values, some of which change."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.count, self.center, self.rows = 0, torch.zeros(2), [torch.zeros(2)]
        self.recent: deque[int] = deque(maxlen=2)
        self.draws = np.random.default_rng(0)
        self.same_number, self.same_rows, self.same_names = 1, torch.zeros(2), {"a": [1]}

    def train_one_iter(self, batch: Any) -> dict[str, Any]:
        self.count += 1
        self.recent.append(self.count)
        self.draws.random()
        self.center.add_(1)
        self.rows[0].add_(1)
        self.last_batch = batch
        return super().train_one_iter(batch)


def test_plain_values_that_have_changed_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(tmp_path / "run", 3, kind=Counting).train()
    names = ", ".join(f"trainer.{name}" for name in ("count", "center", "rows", "recent", "draws", "last_batch"))
    text = f"Not in the checkpoints, although changed since the run began: {names}. If"
    assert warnings_of(caplog).count(text) == warnings_of(caplog).count("Not in the checkpoints") == 1


@dataclasses.dataclass
class Record:
    opt: Any


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "a namespace": lambda opt: types.SimpleNamespace(opt=opt),
    "a dataclass": Record,
    "a deque": lambda opt: deque([opt]),
    "a mapping": lambda opt: types.MappingProxyType({"opt": opt}),
    "all of them": lambda opt: {"a": [types.SimpleNamespace(b=Record(opt))]},
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_optimizers_are_found_in(hold: Callable[[Any], Any], tmp_path: Path) -> None:
    class Holding(Gan):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.held = hold(Adam(self.teacher.parameters()))

    trainer = build(tmp_path / "run", 1, kind=Holding)
    trainer.train()
    (name,) = [name for name in saved(trainer) if name.startswith("held")]
    assert "param_groups" in str(saved(trainer)[name])


def test_an_optimizer_in_an_object_without_a_state_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.agent = Inventing()
    vars(trainer.agent).update(opt=Adam([nn.Parameter(torch.zeros(1))]), known=trainer.opt_d, model=trainer.model)
    trainer.train()
    text = "Not in the checkpoints: trainer.agent.opt, because Inventing has no state_dict() and load_state_dict()."
    assert warnings_of(caplog).count(text) == 1


# ---------------------------------------------------------------- and nothing else


class Inventing:
    """Has every attribute that it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: {}


def test_what_only_looks_like_it_is_left_alone(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", 1)
    trainer.inventing, trainer.kind, trainer.losses = Inventing(), Queue, [0.5] * 10_000
    trainer.proxy, trainer.hook = weakref.proxy(trainer.model), trainer.hooks[0]
    trainer.train()
    assert not {"inventing", "kind", "proxy", "hook"} & set(saved(trainer))


def test_a_parameter_with_an_optimizer_of_its_own_resumes(tmp_path: Path) -> None:
    """As the temperature of SAC has it."""

    def train(name: str, epochs: int) -> Any:
        trainer = build(tmp_path / name, epochs)
        trainer.log_alpha = nn.Parameter(torch.zeros(1))
        trainer.opt_alpha = Adam([trainer.log_alpha], lr=0.1)

        def step(trainer: Any) -> None:
            trainer.opt_alpha.zero_grad()
            (trainer.log_alpha.exp() * torch.rand(1)).sum().backward()
            trainer.opt_alpha.step()

        trainer.register_hooks([On(after_iter=step)])
        trainer.train()
        return [trainer.log_alpha.detach(), trainer.opt_alpha.state[trainer.log_alpha]]

    whole = train("whole", 3)
    train("parts", 1)
    assert differences(whole, train("parts", 3)) == []


def test_the_parameters_of_an_optimizer_may_come_in_another_order(whole: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "run", 2).train()
    trainer = build(tmp_path / "run", seed=1)
    parameters = [*trainer.model["d"].parameters()]
    trainer.opt_d = Adam(parameters[::-1], lr=0.01)
    trainer.schedules = {
        "d": ExponentialLR(trainer.opt_d, 0.9),
        "plateau": ReduceLROnPlateau(trainer.opt_d, patience=1),
    }
    trainer.train()
    came = [trainer.opt_d.state[parameter] for parameter in parameters]
    assert differences([*whole["opt_d"]["state"].values()], came) == []


def test_a_module_is_the_same_with_and_without_its_wrapper(tmp_path: Path) -> None:
    for epochs, compiled in [(1, True), (2, False), (3, True)]:
        trainer = build(tmp_path / "run", epochs)
        trainer.other = nn.Linear(1, 1)
        trainer.opt_other = SGD(trainer.other.parameters(), lr=1.0)
        trainer.same_model = torch.compile(trainer.model, backend="eager")
        if compiled:
            trainer.other = torch.compile(trainer.other, backend="eager")
        else:
            trainer.other = nn.DataParallel(trainer.other)
        if epochs == 1:
            with torch.no_grad():
                next(trainer.other.parameters()).fill_(3.0)
        trainer.train()
        assert next(trainer.other.parameters()).item() == 3.0
        assert set(saved(trainer)["other"]) == {"weight", "bias"}
        assert "same_model" not in saved(trainer)


def test_containers_are_looked_into(tmp_path: Path) -> None:
    queues = [Queue(), Queue()]
    for epochs in (1, 2):
        trainer = build(tmp_path / "run", epochs)
        queues = [Queue(), Queue()]
        trainer.deep = {"a": [queues[0], {"b": (queues[1],)}], 3: "c"}
        trainer.register_hooks([On(after_iter=lambda trainer, queues=queues: [q.put(torch.ones(2)) for q in queues])])
        trainer.train()
    assert [queue.at for queue in queues] == [10, 10]


def test_lambdas_schedule_of_an_attribute_resumes(tmp_path: Path) -> None:
    rates = {}
    for name, epochs in [("whole", 3), ("parts", 1), ("parts", 3)]:
        trainer = build(tmp_path / name, epochs)
        trainer.opt_more = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        trainer.more = LambdaLR(trainer.opt_more, lambda n: 1 / (n + 1))
        trainer.register_hooks([On(after_iter=lambda trainer: (trainer.opt_more.step(), trainer.more.step()))])
        trainer.train()
        rates[name] = trainer.opt_more.param_groups[0]["lr"]
    assert rates["whole"] == rates["parts"] == 1 / 16


def test_a_trainer_with_attributes_is_freed_without_the_collector(tmp_path: Path) -> None:
    def run(number: int) -> weakref.ref[Any]:
        trainer = build(tmp_path / str(number), 1)
        trainer.train()
        return weakref.ref(trainer)

    run(0)
    gc.collect()
    gc.disable()
    try:
        assert run(1)() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_few_library_frames_stand_above_an_error_in_a_state(method: str, tmp_path: Path) -> None:
    build(tmp_path / "run", 1).train()
    trainer = build(tmp_path / "run", 2)
    trainer.queue.__class__ = type("Failing", (Queue,), {method: fail})
    assert len(library_frames(raised_by(trainer.train, UserError))) <= 6


def test_an_object_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    build(tmp_path / "run", 1).train()
    trainer = build(tmp_path / "run", resume=None)
    before = copied(trainer.model.state_dict())
    optimizer = copied(trainer.optimizer.state_dict())

    def refuse(state: Any) -> None:
        raise UserError

    trainer.queue.load_state_dict = refuse
    raised_by(lambda: trainer.load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pth"), UserError)
    assert differences(before, copied(trainer.model.state_dict())) == []
    assert differences(optimizer, copied(trainer.optimizer.state_dict())) == []
    assert trainer.progress.iter == 0


@pytest.mark.parametrize("compiled", [(True, False), (False, True)])
def test_a_module_with_a_compiled_part_continues_a_bare_one(compiled: tuple[bool, bool], tmp_path: Path) -> None:
    def run(name: str, epochs: int, is_compiled: bool) -> nn.Module:
        class Critic(Trainer):
            def train_one_iter(self, batch: Any) -> Any:
                self.opt.zero_grad()
                self.critic(batch).square().mean().backward()
                self.opt.step()
                return super().train_one_iter(batch)

        torch.manual_seed(0)
        model, body = nn.Linear(2, 1), nn.Linear(2, 2)
        step = lambda model, batch: model(batch).square().mean()  # noqa: E731
        data = list(torch.randn(3, 4, 2))
        settings: Any = {"hooks": [CheckpointerHook()], "step_fn": step, "create_new_dir": None, "resume": "auto"}
        trainer: Any = Critic(model, SGD(model.parameters(), lr=0.1), None, data, epochs, tmp_path / name, **settings)
        trainer.critic = nn.Sequential(torch.compile(body, backend="eager") if is_compiled else body, nn.Linear(2, 1))
        trainer.opt = Adam(trainer.critic.parameters(), lr=0.1)
        trainer.train()
        critic: nn.Module = trainer.critic
        return critic

    whole = run("whole", 4, False)
    run("parts", 2, compiled[0])
    parts = run("parts", 4, compiled[1])
    assert not differences(list(parts.state_dict().values()), list(whole.state_dict().values()))
