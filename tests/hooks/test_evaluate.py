"""Evaluation counts every sample once and leaves the training as it was."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.small_hooks import On
from tests.small_runs import Net, differences, make_batches, make_trainer, weights_of
from torch_frame import EvalHook, SettingError, Trainer


def squared_errors(model: Any, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    return {"error": (model.predict(x) - y).square().flatten()}


def evaluate(work_dir: Path, dataloader: Any, eval_func: Any, **kwargs: Any) -> Trainer:
    settings = {name: kwargs.pop(name) for name in ("model", "max_epochs", "use_ema") if name in kwargs}
    trainer = make_trainer(work_dir, hooks=[EvalHook(dataloader, eval_func, **kwargs)], **{"max_epochs": 1, **settings})
    trainer.train()
    return trainer


KINDS = {
    "tensor": lambda values: torch.tensor(values, dtype=torch.float64),
    "float32": lambda values: torch.tensor(values),
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "list_of_tensors": lambda values: [torch.tensor(value, dtype=torch.float64) for value in values],
    "bool_tensor": lambda values: torch.tensor(values) > 0,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[1], [4, 4, 4], [4, 4, 1], [1, 7, 2]], ids=str)
def test_the_mean_is_over_samples_however_they_are_batched(sizes: list[int], kind: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    batches = [[draw.uniform(-1, 1) for _ in range(size)] for size in sizes]
    trainer = evaluate(tmp_path, batches, lambda model, batch: {"score": KINDS[kind](batch)})
    flat = [float(value) for batch in batches for value in KINDS[kind](batch)]
    assert trainer.metric_storage["eval_score"].latest == pytest.approx(math.fsum(flat) / len(flat), rel=1e-15)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_the_mean_does_not_depend_on_the_batch_size(batch_size: int, tmp_path: Path) -> None:
    x, y = make_batches(1, 20)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
    model = Net().double()
    trainer = make_trainer(
        tmp_path, model, data=[(x.double(), y.double())], max_epochs=1,
        hooks=[EvalHook([(a.double(), b.double()) for a, b in loader], squared_errors)],
    )  # fmt: skip
    trainer.train()
    expected = (model.predict(x.double()) - y.double()).square().mean().item()
    assert trainer.metric_storage["eval_error"].latest == pytest.approx(expected, rel=1e-12)


def test_many_equal_scores_have_exactly_their_mean(tmp_path: Path) -> None:
    trainer = evaluate(tmp_path, range(1000), lambda model, batch: {"tenth": [0.1] * 10})
    assert trainer.metric_storage["eval_tenth"].latest == 0.1


class Frozen(Net):
    """Its batch norm stays in eval mode while the model trains, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__(norm=True, dropout=True)
        self.layers[1].eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.layers[1].eval()
        return self


def test_each_modules_mode_is_as_before(tmp_path: Path) -> None:
    modes: list[list[bool]] = []

    def look(trainer: Trainer) -> None:
        modes.append([module.training for module in trainer.model.modules()])

    seen: list[bool] = []

    def scores(model: nn.Module, batch: Any) -> Any:
        seen.append(any(module.training for module in model.modules()) or torch.is_grad_enabled())
        return {"a": [1.0]}

    model = Net(norm=True, dropout=True)
    before = On(before_iter=lambda trainer: model.layers[3].eval(), after_epoch=look)
    hooks = [before, EvalHook(make_batches(1), scores), On(after_epoch=look)]
    make_trainer(tmp_path, model, hooks=hooks).train()
    assert seen == [False, False]
    assert modes[0] == modes[1] == [True, True, True, True, True, False, True]


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    model = Frozen()
    before = weights_of(model.layers[1])
    evaluate(tmp_path, make_batches(2), squared_errors, model=model, max_epochs=2)
    assert differences(before, weights_of(model.layers[1])) == []


def test_modes_come_back_after_an_error(tmp_path: Path) -> None:
    def fail(model: Any, batch: Any) -> Any:
        raise ZeroDivisionError

    model = Net(dropout=True)
    with pytest.raises(ZeroDivisionError):
        evaluate(tmp_path, make_batches(1), fail, model=model)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_is_the_same_with_and_without_evaluation(num_workers: int, shuffle: bool, tmp_path: Path) -> None:
    def noisy(model: Any, batch: Any) -> Any:
        torch.rand(5), np.random.rand(3), random.random()
        return squared_errors(model, batch)

    x, y = make_batches(1, 12)[0]
    models = [Net(norm=True, dropout=True), Net(norm=True, dropout=True)]
    states = []
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=shuffle, num_workers=num_workers)
    for number, hooks in enumerate(([], [EvalHook(loader, noisy)])):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        make_trainer(tmp_path / str(number), models[number], hooks=hooks, max_epochs=3).train()
        states.append([torch.get_rng_state(), random.random(), float(np.random.rand())])
    assert differences(weights_of(models[0]), weights_of(models[1])) == []
    assert differences(states[0], states[1]) == []


def test_emas_model_is_evaluated_where_there_is_one(tmp_path: Path) -> None:
    evaluated: list[nn.Module] = []

    def scores(model: nn.Module, batch: Any) -> Any:
        evaluated.append(model)
        return {"a": [1.0]}

    trainer = evaluate(tmp_path, [0], scores, use_ema=True)
    assert evaluated == [trainer.model_ema.model]
    assert trainer.model_evaluate is trainer.model_ema.model


@pytest.mark.parametrize(("period", "epochs", "expected"), [(1, 3, [0, 1, 2]), (2, 5, [1, 3, 4]), (9, 2, [1])])
def test_evaluates_every_period_and_after_the_last_epoch(
    period: int, epochs: int, expected: list[int], tmp_path: Path
) -> None:
    seen: list[int] = []

    class Own(EvalHook):
        def _do_eval(self) -> None:
            seen.append(self.trainer.epoch)
            super()._do_eval()

    make_trainer(tmp_path, max_epochs=epochs, hooks=[Own(make_batches(1), squared_errors, period)]).train()
    assert seen == expected


def test_the_prefix_is_that_of_the_names(tmp_path: Path) -> None:
    trainer = evaluate(tmp_path, make_batches(1), squared_errors, prefix="val", save_metric="error", max_first=False)
    assert "val_error" in trainer.metric_storage
    assert trainer.hooks[0].save_metric == "val_error"  # type: ignore[attr-defined]


def test_two_evaluations_with_their_own_prefixes_run_in_one_training(tmp_path: Path) -> None:
    hooks = [EvalHook(make_batches(1), squared_errors, prefix=prefix) for prefix in ("val", "test")]
    trainer = make_trainer(tmp_path, hooks=hooks)
    trainer.train()
    assert {"val_error", "test_error"} <= set(trainer.metric_storage)


def test_the_positional_arguments_are_those_of_1_7() -> None:
    loader = make_batches(1)
    hook = EvalHook(loader, squared_errors, 2, 3, "error", False, False, "val")
    assert (hook._period, hook._max_to_keep, hook.save_metric, hook.max_first, hook.save_last) == (
        2,
        3,
        "val_error",
        False,
        False,
    )
    assert hook.dataloader is loader


def test_a_loader_without_length_is_evaluated(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([0.0, 1.0, 2.0, 3.0, 4.0])

    loader = DataLoader(Stream(), batch_size=2)
    trainer = evaluate(tmp_path, loader, lambda model, batch: {"mean": batch.double()})
    assert trainer.metric_storage["eval_mean"].latest == 2.0


BAD = {
    "a_mean": lambda model, batch: {"acc": 0.5},
    "a_scalar_tensor": lambda model, batch: {"acc": torch.tensor(0.5)},
    "a_text_among_scores": lambda model, batch: {"acc": [0.5, "good"]},
    "a_dict": lambda model, batch: {"acc": {"a": 0.5}},
    "a_text": lambda model, batch: {"acc": "0.5"},
    "a_set": lambda model, batch: {"acc": {0.5, 1.0}},
    "complex_numbers": lambda model, batch: {"acc": torch.ones(3, dtype=torch.complex64)},
    "an_array_of_complex_numbers": lambda model, batch: {"acc": np.ones(3, dtype=np.complex128)},
    "a_masked_array": lambda model, batch: {"acc": np.ma.masked_array([0.5, 1.0], mask=[False, True])},
    "an_array_of_objects": lambda model, batch: {"acc": np.array([0.5, None])},
    "a_name_that_is_a_number": lambda model, batch: {1: [0.5]},
    "a_list": lambda model, batch: [0.5],
    "nothing": lambda model, batch: None,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_no_score_for_each_sample_is_refused(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="eval_func returned"):
        evaluate(tmp_path, [0], bad)


GRID = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[4.0, 5.0], [6.0, 7.0]]), torch.tensor([[8.0, 9.0]])]
FORMS = {
    "array_of_two_dimensions": (lambda m, b: {"acc": b.numpy()}, 4.5),
    "tensor_of_two_dimensions": (lambda m, b: {"acc": b}, 4.5),
    "lists_of_lists": (lambda m, b: {"acc": b.tolist()}, 4.5),
    "lists_of_arrays": (lambda m, b: {"acc": list(b.numpy())}, 4.5),
    "lists_of_tensors": (lambda m, b: {"acc": list(b)}, 4.5),
    "tuples": (lambda m, b: {"acc": tuple(b[:, 0].tolist())}, 4.0),
    "map": (lambda m, b: {"acc": map(float, b[:, 0])}, 4.0),
    "generator": (lambda m, b: {"acc": (x for x in b[:, 0].tolist())}, 4.0),
    "booleans": (lambda m, b: {"acc": b[:, 0] > 3}, 0.6),
    "nothing_for_the_first_batch": (lambda m, b: {} if b[0, 0] == 0 else {"acc": b[:, 0].tolist()}, 6.0),
}


@pytest.mark.parametrize(("eval_func", "mean"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("save_metric", [None, "acc"])
def test_scores_of_any_form_that_1_7_took(eval_func: Any, mean: float, save_metric: str | None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[EvalHook(GRID, eval_func, save_metric=save_metric)], max_epochs=1)
    trainer.train()
    assert trainer.value("eval_acc") == pytest.approx(mean)


def test_scores_of_several_types_are_not_rounded_to_one_another(tmp_path: Path) -> None:
    parts = {0: torch.tensor([257, 257]), 1: torch.tensor([1.5], dtype=torch.bfloat16)}
    trainer = evaluate(tmp_path, list(parts), lambda model, batch: {"mean": parts[batch]})
    assert trainer.metric_storage["eval_mean"].latest == (257 + 257 + 1.5) / 3


def test_batches_may_stay_where_the_loader_puts_them(tmp_path: Path) -> None:
    class Batch:
        """Says where it was moved to."""

        moved = False

        def to(self, device: Any) -> Any:
            self.moved = True
            return self

    seen: list[bool] = []

    def look(model: Any, batch: Any) -> Any:
        seen.append(batch.moved)
        return {"a": [1.0]}

    for to_device in (True, False):
        hook = EvalHook([Batch()], look, save_metric="a", to_device=to_device)
        make_trainer(tmp_path / str(to_device), hooks=[hook], max_epochs=1).train()
    assert seen == [True, True, False, False]


def test_period_0_evaluates_after_the_last_epoch_only(tmp_path: Path) -> None:
    epochs: list[int] = []
    look = lambda m, b: epochs.append(trainer.epoch) or {"a": [1.0]}  # noqa: E731
    trainer = make_trainer(tmp_path, hooks=[EvalHook([0], look, period=np.int64(0), max_to_keep=3)], max_epochs=3)
    trainer.train()
    assert epochs == [2]
    assert Path(trainer.ckpt_dir, "epoch_2.pth").exists()
    assert not Path(trainer.ckpt_dir, "epoch_0.pth").exists()


def test_an_empty_evaluation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no batch"):
        evaluate(tmp_path, [], squared_errors)


def test_an_iterator_is_refused() -> None:
    with pytest.raises(SettingError, match="iterator"):
        EvalHook(iter(make_batches(2)), squared_errors)


def test_an_eval_func_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="eval_func"):
        EvalHook(make_batches(2), "accuracy")  # type: ignore[arg-type]


def test_nan_scores_give_nan(tmp_path: Path) -> None:
    trainer = evaluate(tmp_path, [0], lambda model, batch: {"a": [1.0, math.nan]})
    assert math.isnan(trainer.metric_storage["eval_a"].latest)


@pytest.mark.parametrize("form", ["tensor", "array", "list of tensors", "list of arrays"])
def test_scores_that_the_next_batch_overwrites_count_as_they_were(form: str, tmp_path: Path) -> None:
    """A model that writes into one buffer: torch.compile(mode="reduce-overhead") makes such."""
    buffer = torch.zeros(2)

    def score(model: Any, batch: int) -> Any:
        buffer.fill_(batch)
        rows = [buffer[:1], buffer[1:]]
        forms = {
            "tensor": buffer,
            "array": buffer.numpy(),
            "list of tensors": rows,
            "list of arrays": [row.numpy() for row in rows],
        }
        return {"a": forms[form]}

    trainer = evaluate(tmp_path, [1, 2, 6], score)
    assert trainer.metric_storage["eval_a"].latest == 3.0


class ByItself(EvalHook):
    """As in 1.7's scripts: evaluates in a way of its own, and hands on whatever it likes."""

    def __init__(self, dataloader: Any, **settings: Any) -> None:
        super().__init__(dataloader, None, save_metric="acc", **settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def _do_eval(self) -> None:
        self.log(self.trainer.epoch, smooth=False, window_size=1, **{f"{self.prefix}acc": 0.75})


@pytest.mark.parametrize("dataloader", [None, [], iter([1])], ids=["None", "empty", "iterator"])
def test_an_evaluation_of_the_scripts_own_needs_no_loader_and_no_function(dataloader: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hooks=[ByItself(dataloader)])
    trainer.train()
    assert trainer.metric_storage["eval_acc"].latest == 0.75
    assert Path(trainer.ckpt_dir, "best.pth").exists()


def test_evaluate_by_hand_is_not_another_evaluation_than_the_scripts_own(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="ByItself evaluates in a _do_eval of its own"):
        make_trainer(tmp_path, hooks=[ByItself(None)]).evaluate()

    class Both(ByItself):
        def evaluate(self) -> dict[str, float]:
            return {"eval_acc": 0.25}

    assert make_trainer(tmp_path, hooks=[Both(None)]).evaluate() == {"eval_acc": 0.25}

    class Extended(EvalHook):
        @torch.no_grad()
        def _do_eval(self) -> None:
            super()._do_eval()

    hook = Extended(make_batches(1), lambda model, batch: {"acc": [0.5]}, progress_bar=False)
    assert make_trainer(tmp_path, hooks=[hook]).evaluate() == {"eval_acc": 0.5}


def test_scores_logged_by_iterations_do_not_go_on_by_epochs(tmp_path: Path) -> None:
    def run(max_epochs: int, prefix: str = "val", **unit: Any) -> Trainer:
        hooks = [
            EvalHook(make_batches(1), lambda m, b: {"acc": [0.5]}, progress_bar=False, prefix=prefix, **unit),
            EvalHook(make_batches(1), lambda m, b: {"acc": [0.5]}, progress_bar=False, prefix="val_ood",
                     period=2, period_unit="iter"),
        ]  # fmt: skip
        trainer = make_trainer(tmp_path / "run", hooks=hooks, max_epochs=max_epochs, create_new_dir=None, resume="auto")
        trainer.train()
        return trainer

    run(1, period=2, period_unit="iter")
    with pytest.raises(SettingError, match=r"'val_acc' was logged by iterations.* at 4.*period_unit='iter'"):
        run(2)
    assert run(2, prefix="other").metric_storage["other_acc"].latest == 0.5
    assert run(3, prefix="other").progress.epoch == 3
    assert run(4, prefix="other", period=2, period_unit="iter").progress.epoch == 4
