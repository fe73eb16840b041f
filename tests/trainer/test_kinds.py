"""Models, optimizers and numbers of unusual kinds: they train as torch's own loop does, or a sentence says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import (
    CheckpointerHook,
    EarlyStoppingHook,
    EvalHook,
    LoggerHook,
    RepeatDataset,
    SettingError,
    Trainer,
)


def square(model: Any, batch: Any) -> Tensor:
    return model(batch).square().mean()


# ---------------------------------------------------------------- default dtypes


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request: Any) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip_grad_norm": 0.1},
    "skip": {"on_nonfinite": "skip"},
    "ema": {"use_ema": True, "gradient_accumulation_steps": 2},
    "weights": {"loss_weight": len, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_other_default_dtypes_train_save_and_resume(
    settings: dict[str, Any], default_dtype: torch.dtype, tmp_path: Path
) -> None:
    def run(folder: str, epochs: int, **more: Any) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        data = [torch.ones(4, 2), torch.full((4, 2), 0.5), torch.zeros(4, 2)]
        hooks = [CheckpointerHook(), LoggerHook(progress_bar=False)]
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
        given = {"hooks": hooks, "step_fn": square, "create_new_dir": None, "max_epochs": epochs, **settings, **more}
        trainer = make_trainer(tmp_path / folder, model, optimizer, data=data, **given)
        trainer.train()
        return trainer

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume="auto")
    assert whole.model.weight.dtype == default_dtype
    assert differences(weights_of(whole.model_evaluate), weights_of(parts.model_evaluate)) == []


def test_float64_is_torchs_own_loop(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        models = [nn.Linear(2, 1), nn.Linear(2, 1)]
        models[1].load_state_dict(models[0].state_dict())
        data = list(torch.randn(6, 4, 2))
        optimizer = SGD(models[1].parameters(), lr=0.1)
        for batch in data:
            optimizer.zero_grad()
            square(models[1], batch).backward()
            nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
            optimizer.step()
        make_trainer(tmp_path, models[0], data=data, max_epochs=1, step_fn=square, clip_grad_norm=0.1,
                     optimizer=SGD(models[0].parameters(), lr=0.1)).train()  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    assert differences(weights_of(models[0]), weights_of(models[1])) == []


# ---------------------------------------------------------------- sparse gradients


class Words(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 3, sparse=sparse)
            self.head = nn.Linear(3, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words)).square().mean()


@pytest.mark.parametrize("settings", [
    {"clip_grad_norm": 0.05}, {"clip_grad_norm": 99.0}, {"clip_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    {"clip_grad_norm": 0.05, "on_nonfinite": "skip"}, {"clip_grad_norm": 0.05, "precision": "fp16"},
], ids=str)  # fmt: skip
def test_sparse_gradients_are_clipped_as_dense_ones(settings: dict[str, Any], tmp_path: Path) -> None:
    norms: dict[bool, list[float]] = {True: [], False: []}
    models = {}
    for sparse in norms:
        models[sparse] = model = Words(sparse=sparse)
        note = On(after_iter=lambda t, kind=sparse: norms[kind].append(t.metric_storage["total_loss"].latest))
        data = [torch.tensor([1, 2, 2, 2]), torch.tensor([0, 8, 8, 3]), torch.tensor([5, 5, 2, 1])]
        make_trainer(tmp_path, model, SGD(model.parameters(), lr=0.1), data=data, hooks=[note], **settings).train()
    for name, weight in models[True].state_dict().items():
        torch.testing.assert_close(weight, models[False].state_dict()[name], rtol=1e-5, atol=1e-6)
    assert norms[True] == pytest.approx(norms[False], rel=1e-4)


# ---------------------------------------------------------------- buffers


class Masked(nn.Module):
    """Constant buffers made by expand(), and sparse ones."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(2, 1)
        self.register_buffer("mask", torch.ones(1, 2).expand(4, 2), persistent=persistent)
        self.register_buffer("graph", torch.eye(4).to_sparse(), persistent=persistent)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(torch.sparse.mm(self.graph, batch * self.mask)).square().mean()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_ema": True}, {"on_nonfinite": "skip"}, {"precision": "fp16"}], ids=str)
def test_expanded_and_sparse_buffers_train_and_resume(
    persistent: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    nan = [torch.full((4, 2), float("nan"))] if settings.get("on_nonfinite") == "skip" else []

    def run(folder: str, epochs: int, **more: Any) -> Trainer:
        given = {"hooks": [CheckpointerHook()], "create_new_dir": None, "max_epochs": epochs, **settings, **more}
        data = [torch.ones(4, 2), *nan, torch.full((4, 2), 0.5)]
        trainer = make_trainer(tmp_path / folder, Masked(persistent=persistent), data=data, **given)
        trainer.train()
        return trainer

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4, resume="auto")
    assert torch.equal(whole.model_evaluate.layer.weight, parts.model_evaluate.layer.weight)
    assert torch.equal(whole.model.mask, torch.ones(4, 2))
    assert torch.equal(parts.model_evaluate.graph.to_dense(), torch.eye(4))


# ---------------------------------------------------------------- lazy layers, LBFGS


LAZY: dict[str, Any] = {
    "all": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyLinear(1)),
    "one of them": lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False), nn.Linear(3, 1)),
}


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("settings", [{}, {"use_ema": True}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_are_told_before_anything_and_train_once_they_have_seen_a_batch(
    make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make()
    with pytest.raises(SettingError, match=r"lazy layers, whose shapes are not known yet: .*Pass one batch"):
        make_trainer(tmp_path, model, SGD(model.parameters(), lr=0.1), **settings)
    with torch.no_grad():
        model(torch.ones(4, 3))
    step = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    make_trainer(tmp_path, model, step_fn=step, **settings).train()


def test_lbfgs_is_told_before_the_first_step(tmp_path: Path) -> None:
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(SettingError, match=r"LBFGS computes the loss several times .* Override train_one_iter"):
        trainer.train()
    assert differences(before, weights_of(model)) == []


class ByClosure(Trainer):
    """What the error advises."""

    def train_one_iter(self, batch: Any) -> Any:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.model(batch)
            loss.backward()
            return loss

        return {"total_loss": self.optimizer.step(closure)}


def test_lbfgs_trains_by_the_override_that_is_advised(tmp_path: Path) -> None:
    models = [Net(), Net()]
    batches = make_batches(1) * 3
    optimizers = [torch.optim.LBFGS(model.parameters(), max_iter=4) for model in models]
    for batch in batches:

        def closure(batch: Any = batch) -> Tensor:
            optimizers[1].zero_grad()
            loss = models[1](batch)
            loss.backward()
            return loss

        optimizers[1].step(closure)
    ByClosure(models[0], optimizers[0], None, batches, 1, tmp_path, hooks=[]).train()
    assert differences(weights_of(models[0]), weights_of(models[1])) == []


# ---------------------------------------------------------------- numbers of numpy, precision of evaluations


NUMBERS = {
    "max_epochs": np.int64(2), "gradient_accumulation_steps": np.int32(2), "use_ema": np.bool_(True),
    "clip_grad_norm": np.float32(1), "warmup_iters": np.int64(3), "seed": np.int64(1), "take_over": np.bool_(False),
    "ema_decay": np.float64(0.5), "ema_ramp": np.int64(5), "save_frozen": np.bool_(False),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_and_flags_of_numpy_are_taken_and_saved(name: str, tmp_path: Path) -> None:
    settings = {"hooks": [CheckpointerHook()], "warmup_method": "linear", name: NUMBERS[name]}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    torch.load(f"{trainer.ckpt_dir}/latest.pth", weights_only=True)


def test_numbers_of_numpy_in_hooks_are_taken(tmp_path: Path) -> None:
    number = np.int64(2)
    hooks = [
        CheckpointerHook(period=number, max_to_keep=number, every_n_iters=number, keep_steps=number),
        LoggerHook(period=number),
        EarlyStoppingHook("total_loss", patience=number),
    ]
    make_trainer(tmp_path, hooks=hooks).train()
    assert len(RepeatDataset("ab", number)) == 4
    for bad in (np.float64(2.0), True, np.bool_(True)):
        with pytest.raises(SettingError, match="period"):
            LoggerHook(period=bad)


@pytest.mark.parametrize("precision", [None, "train"])
def test_an_evaluation_runs_under_the_trainings_autocast_if_asked(precision: Any, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def score(model: Any, batch: Any) -> Any:
        seen.add(model.predict(batch[0]).dtype)
        return {"zero": torch.zeros(len(batch[0]))}

    for unit in ("epoch", "iter"):
        hook = EvalHook(make_batches(1), score, save_metric="zero", period_unit=unit, precision=precision)  # type: ignore[arg-type]
        make_trainer(tmp_path, precision="bf16", hooks=[hook]).train()
    assert seen == {torch.bfloat16 if precision else torch.float32}


def test_another_precision_of_an_evaluation_is_refused() -> None:
    with pytest.raises(SettingError, match="precision is 'bf16'"):
        EvalHook(make_batches(1), square, precision="bf16")  # type: ignore[arg-type]
