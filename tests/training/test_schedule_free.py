"""Schedule-free optimizers: scores and files are of the averaged weights, training and resume of the others, bitwise."""

from __future__ import annotations

import copy
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from tests.distributed.processes import on_processes
from tests.small_hooks import On, at_iter
from tests.small_runs import Net, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, EvalHook, HookBase, SettingError, Trainer
from torch_frame.checkpoint import io

schedulefree = pytest.importorskip("schedulefree")

Make = Callable[[Any], Any]
KINDS: dict[str, Make] = {
    "adamw": lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.02, warmup_steps=3),
    "radam": lambda parameters: schedulefree.RAdamScheduleFree(parameters, lr=0.02),
    "sgd": lambda parameters: schedulefree.SGDScheduleFree(parameters, lr=0.5, weight_decay=0.01, foreach=False),
    "reference": lambda parameters: schedulefree.SGDScheduleFreeReference(parameters, lr=0.5),
}
BATCHES = make_batches(5)
Weights = dict[str, Tensor]


def by_hand(make: Make, epochs: int, batches: list[Any] = BATCHES) -> tuple[nn.Module, list[Weights], list[float]]:
    """The package's own loop; scores and weights to use are of a copy, for its train() would round what was trained."""
    model = Net()
    optimizer = make(model.parameters())
    optimizer.train()
    used, scores = [], []
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
        shown, its_optimizer = copy.deepcopy((model, optimizer))
        its_optimizer.eval()
        used.append(weights_of(shown))
        scores.append(float(shown(batches[0]).item()))
    return model, used, scores


def score(model: Any, batch: Any) -> dict[str, list[float]]:
    return {"mse": [float(model(batch).item())]}


def run(folder: Path, make: Make, *hooks: HookBase, epochs: int = 3, **settings: Any) -> Trainer:
    model = Net()
    hooks = (EvalHook(BATCHES[:1], score, save_metric="mse", max_first=False, max_to_keep=9), *hooks)
    settings = {"create_new_dir": None, "data": BATCHES, **settings}
    trainer = make_trainer(folder, model, make(model.parameters()), max_epochs=epochs, hooks=hooks, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_scores_and_weights_are_the_packages_own_and_training_is_undisturbed(make: Make, tmp_path: Path) -> None:
    trained, used, scores = by_hand(make, 3)
    found: list[float] = []
    note = On(after_epoch=lambda trainer: found.append(trainer.metric_storage["eval_mse"].latest))
    mine = On(after_epoch=lambda trainer: found.append(score(trainer.model_evaluate, BATCHES[0])["mse"][0]))
    trainer = run(tmp_path, make, note, mine)
    assert found == [value for value in scores for _ in range(2)]  # a hook's own evaluation too
    best = min(range(3), key=scores.__getitem__)
    assert differences(used[best], torch.load(tmp_path / "checkpoints" / "best.pth")) == []
    state = io.read(tmp_path / "checkpoints" / "latest.pth")
    assert differences(weights_of(trained), state["model"]) == []
    assert differences(used[-1], weights_of(trainer.model)) == []  # what a script has in its hands afterwards
    assert trainer.evaluate() == {"eval_mse": scores[-1]}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(
    at: int, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.should_stop = True

    whole = run(tmp_path / "whole", make)
    run(tmp_path / "parts", make, On(after_iter=at_iter(at, stop)))
    caplog.clear()
    parts = run(tmp_path / "parts", make, resume="auto")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []
    states = [io.read(Path(trainer.ckpt_dir, "latest.pth")) for trainer in (whole, parts)]
    for part in ("model", "optimizers"):
        assert differences(states[0][part], states[1][part]) == []


def test_a_second_train_goes_on_bitwise(tmp_path: Path) -> None:
    make = KINDS["adamw"]
    whole = run(tmp_path / "whole", make)
    parts = run(tmp_path / "parts", make, epochs=1)
    parts.max_epochs = 3
    parts.train()
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []


def test_weights_that_were_loaded_meanwhile_are_trained_on(tmp_path: Path) -> None:
    trainer = run(tmp_path, KINDS["sgd"], epochs=1)
    x = weights_of(Net(seed=5))
    trainer.model.load_state_dict(x)
    z = {name: trainer.optimizer.state[p]["z"].clone() for name, p in trainer.model.named_parameters()}
    seen: list[Weights] = []
    trainer.register_hooks([On(before_epoch=lambda trainer: seen.append(weights_of(trainer.model)))])
    trainer.max_epochs = 2
    trainer.train()
    assert differences(seen[0], {name: x[name].lerp(z[name], 1 - 0.9) for name in x}) == []


def test_weights_saved_and_evaluated_inside_an_epoch_are_the_averaged_ones(tmp_path: Path) -> None:
    make = KINDS["adamw"]
    model = Net()
    trainer = make_trainer(
        tmp_path,
        model,
        make(model.parameters()),
        data=BATCHES,
        create_new_dir=None,
        hooks=[
            CheckpointerHook(every_n_iters=2, keep_steps=9),
            EvalHook(BATCHES[:1], score, period=2, period_unit="iter", prefix="often"),
            On(after_iter=at_iter(3, lambda trainer: trainer.save_checkpoint("now.pth"))),
        ],
        max_epochs=1,
    )
    trainer.train()
    _, used, scores = by_hand(make, 1, BATCHES[:4])
    for name in ("step_4.pth", "now.pth"):
        assert differences(used[0], torch.load(tmp_path / "checkpoints" / name)) == []
    whole, *_ = by_hand(make, 1)
    assert differences(weights_of(whole), io.read(tmp_path / "checkpoints" / "latest.pth")["model"]) == []
    assert trainer.metric_storage["often_mse"]._history[-1] != scores[0]  # of the epoch's end


@pytest.mark.parametrize("method", ["save_checkpoint", "save_at_safe_point"])
@pytest.mark.parametrize("stage", ["after_epoch", "after_train"])
def test_a_whole_state_that_a_hook_saves_itself_is_of_training(stage: str, method: str, tmp_path: Path) -> None:
    make = KINDS["adamw"]
    hooks = [On(**{stage: lambda trainer: getattr(trainer, method)("mine.pth", save_single_model=False)})]
    trainer = run(tmp_path, make, *hooks, epochs=1)
    trained, used, _ = by_hand(make, 1)
    assert differences(weights_of(trained), io.read(tmp_path / "checkpoints" / "mine.pth")["model"]) == []
    assert differences(used[0], weights_of(trainer.model)) == []


def test_a_hook_of_before_that_switches_itself_is_undisturbed(tmp_path: Path) -> None:
    make = KINDS["sgd"]
    mine = On(after_epoch=lambda trainer: (trainer.optimizer.eval(), trainer.optimizer.train()))
    trainer = run(tmp_path, make, mine)
    _, used, _ = by_hand(make, 3)
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value, used[-1][name], rtol=1e-5, atol=1e-6)


def test_a_run_that_fails_leaves_the_weights_to_use(tmp_path: Path) -> None:
    make = KINDS["sgd"]

    def fail(trainer: Trainer) -> None:
        raise ValueError("mine")

    model = Net()
    hooks = [On(after_iter=at_iter(4, fail))]
    trainer = make_trainer(tmp_path, model, make(model.parameters()), data=BATCHES, hooks=hooks)
    raised_by(trainer.train, ValueError)
    _, used, _ = by_hand(make, 1)
    assert differences(used[0], weights_of(model)) == []


class Two(Trainer):
    def train_one_iter(self, batch: Any) -> Any:
        total = {}
        for name, part in zip("ab", self.model, strict=True):
            total[name] = part(batch)
            self.update(total[name], name)
        return total


def test_of_several_optimizers_each_is_switched(tmp_path: Path) -> None:
    model = nn.ModuleList([Net(), Net()])
    makes = KINDS["adamw"], lambda parameters: SGD(parameters, lr=0.05)
    optimizers = {name: make(part.parameters()) for name, make, part in zip("ab", makes, model, strict=True)}
    trainer = Two(model, optimizers, None, BATCHES, 2, tmp_path, hooks=[CheckpointerHook()], create_new_dir=None)
    trainer.train()
    trained, used, _ = by_hand(KINDS["adamw"], 2)
    saved = torch.load(tmp_path / "checkpoints" / "best.pth")
    for name in used[-1]:
        assert torch.equal(saved[f"0.{name}"], used[-1][name])
    state = io.read(tmp_path / "checkpoints" / "latest.pth")["model"]
    assert all(torch.equal(state[f"0.{name}"], value) for name, value in weights_of(trained).items())
    plain = make_trainer(tmp_path / "plain", data=BATCHES)
    plain.train()
    assert all(torch.equal(saved[f"1.{name}"], value) for name, value in weights_of(plain.model).items())


def test_a_list_of_them_steps_together(tmp_path: Path) -> None:
    model = Net()
    half = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizers = [KINDS["adamw"](half[0]), KINDS["adamw"](half[1])]
    trainer = make_trainer(tmp_path, model, optimizers, data=BATCHES, hooks=[CheckpointerHook()], create_new_dir=None)
    trainer.train()
    _, used, _ = by_hand(KINDS["adamw"], 2)
    assert differences(used[-1], torch.load(tmp_path / "checkpoints" / "best.pth")) == []


def test_ema_beside_it_is_refused(tmp_path: Path) -> None:
    error = raised_by(lambda: run(tmp_path, KINDS["adamw"], use_ema=True), SettingError)
    assert "AdamWScheduleFree keeps an average of the weights itself" in str(error)
    assert "Remove use_ema" in str(error)


def test_statistics_of_the_other_weights_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, model, KINDS["sgd"](model.parameters()), data=BATCHES)
    trainer.train()
    assert "running statistics of 1" in Path(trainer.log_file).read_text()
    assert caplog.text.count("running statistics of 1 normalisation layers are of training's") == 1


def test_a_run_that_a_signal_stops_in_an_evaluation_resumes_bitwise(tmp_path: Path) -> None:
    make, calls = KINDS["adamw"], []

    def asks_to_stop(model: Any, batch: Any) -> dict[str, list[float]]:
        calls.append(batch)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"mine": [0.0]}

    whole = run(tmp_path / "whole", make)
    error = raised_by(lambda: run(tmp_path / "parts", make, EvalHook(BATCHES, asks_to_stop, prefix="b")), SystemExit)
    assert str(error) == "143"
    state = io.read(tmp_path / "parts" / "checkpoints" / "latest.pth")
    assert differences(weights_of(by_hand(make, 1)[0]), state["model"]) == []
    parts = run(tmp_path / "parts", make, EvalHook(BATCHES, asks_to_stop, prefix="b"), resume="auto")
    assert differences(weights_of(whole.model), weights_of(parts.model)) == []


def on_a_rank(folder: Path) -> Any:
    keep = CheckpointerHook(max_to_keep=9)
    trainer = run(folder, KINDS["adamw"], keep, strategy="ddp", data=DataLoader(Pairs(), 2, shuffle=True), seed=0)
    return weights_of(trainer.model_or_module), trainer.evaluate()


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.linspace(-1, 1, 3) * (index % 5 - 2), torch.tensor([index / 6])


def test_on_two_ranks_it_is_the_same(tmp_path: Path) -> None:
    (first, score_0), (second, score_1) = on_processes(on_a_rank, tmp_path, 2, tmp_path / "run")
    assert differences(first, second) == []
    assert score_0 == score_1
    used = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pth")
    assert differences(first, used) == []
    assert differences(used, io.read(tmp_path / "run" / "checkpoints" / "latest.pth")["model"]) != []


def test_accelerates_wrapper_is_seen_through(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from torch_frame import AccelerateTrainer

    make, model = KINDS["adamw"], Net()
    optimizer = make(model.parameters())
    settings: dict[str, Any] = {"hooks": [CheckpointerHook()], "create_new_dir": None, "mixed_precision": "no"}
    AccelerateTrainer(model, optimizer, None, BATCHES, 2, tmp_path, **settings).train()
    assert differences(by_hand(make, 2)[1][-1], torch.load(tmp_path / "checkpoints" / "best.pth")) == []


def test_weights_of_a_whole_state_are_told_to_be_those_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(run(tmp_path / "run", KINDS["adamw"], epochs=1).ckpt_dir)
    for name, is_told in (("best.pth", False), ("latest.pth", True)):
        caplog.clear()
        trainer = make_trainer(tmp_path / name, data=BATCHES, max_epochs=1)
        trainer.load_checkpoint(checkpoint=io.read(folder / name))
        trainer.train()
        assert ("which holds those of training" in caplog.text) is is_told


def test_an_optimizer_of_torchs_is_left_alone(tmp_path: Path) -> None:
    model = Net()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.05)
    trainer = make_trainer(tmp_path, model, optimizer, data=BATCHES)
    with trainer.schedule_free.shown(), trainer.schedule_free.trained():
        pass
    versions = [p._version for p in model.parameters()]
    trainer.schedule_free.show()
    trainer.schedule_free.train()
    assert [p._version for p in model.parameters()] == versions
