"""EvalHook: scores on held-out data, and the best model by them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torch_frame.data.move import move_to_device
from torch_frame.data.rng import preserved_rng
from torch_frame.data.shards import check_reports, deal
from torch_frame.data.source import length_of
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.tracking.bar import ProgressBar
from torch_frame.training.buffers import BufferSnapshot

Scores = Mapping[str, Any]
"""name -> the scores of a batch's samples: a list of numbers, a 1-d array or a 1-d tensor."""


class EvaluationHook(CheckpointerHook):
    """Base of hooks that evaluate: when they do, under which conditions, and what follows from the scores.

    Runs after each `period`-th epoch and after the last one, or, with `period_unit="iter"`, after each `period`-th batch of the
    run and after the last one. The model is EMA's if EMA is on, in eval mode, without gradients, in the precision of its
    weights (use `torch.autocast` in your function for another); training mode and random numbers of the training are as if there
    had been no evaluation.

    Subclasses write `evaluate` and `trial`.

    On several ranks that all have the hook, each evaluates some of the batches, with the buffers (batch norm's statistics) of
    rank 0, and all get the scores of the whole. If only rank 0 has it, rank 0 evaluates all batches, and the others wait.

    Args:
        period: epochs, or batches, between evaluations.
        max_to_keep, max_first, save_last: as for CheckpointerHook.
        save_metric: the full name that `best.pth` follows; None: no metric decides.
        period_unit: "epoch" or "iter".
        inference_mode: evaluate in `torch.inference_mode`, which is a little faster than `no_grad`; a tensor that the model
            caches meanwhile (a grid of YOLOX) cannot be used in training afterwards.
        progress_bar: show one.
        own_shards: the dataloader gives each rank a part of its own already; else it yields the whole data on all ranks.

    Stores: what CheckpointerHook stores.
    """

    _kept_otherwise = CheckpointerHook._kept_otherwise | {"_score_names", "results"}

    def __init__(
        self,
        period: int,
        max_to_keep: int | None,
        save_metric: str | None,
        max_first: bool,
        save_last: bool,
        *,
        period_unit: Literal["epoch", "iter"] = "epoch",
        inference_mode: bool = False,
        progress_bar: bool = True,
        own_shards: bool = False,
    ) -> None:
        super().__init__(period, max_to_keep, save_metric, max_first, save_last)
        if period_unit not in ("epoch", "iter"):
            raise SettingError(f"period_unit is {period_unit!r}; it has to be 'epoch' or 'iter'.")
        self.period_unit = period_unit
        self.inference_mode = inference_mode
        self.progress_bar = progress_bar
        self.own_shards = own_shards
        self._score_names: set[str] | None = None
        own_after_iter = type(self).after_iter is EvaluationHook.after_iter
        self.idle_stages = frozenset({"after_iter"} if period_unit == "epoch" and own_after_iter else ())

    def evaluate(self) -> dict[str, float]:
        """Evaluate now: full name -> value. Nothing is logged or saved."""
        raise NotImplementedError(f"{self.class_name} has no evaluate().")

    def trial(self) -> set[str] | None:
        """The full names of the scores, found out on one batch; None: not known."""
        raise NotImplementedError(f"{self.class_name} has no trial().")

    def before_train(self) -> None:
        """Evaluate one batch, so that a wrong name or form is told now and not after the first epoch."""
        super().before_train()
        if self.save_metric is None or type(self)._do_eval is not EvaluationHook._do_eval:
            return
        self._score_names = self.trial()
        if self._score_names is not None and self.save_metric not in self._score_names:
            own = getattr(self, "prefix", "")
            prefix = own if self.save_metric.startswith(own) else ""
            names = sorted(name.removeprefix(prefix) for name in self._score_names)
            raise SettingError(
                f"save_metric is {self.save_metric.removeprefix(prefix)!r}, but the evaluation yields "
                f"{', '.join(map(repr, names)) or 'nothing'}."
            )

    def logged_metrics(self) -> set[str] | None:
        return self._score_names

    def after_iter(self) -> None:
        if self.period_unit == "iter" and (self.every_n_iters(self._period) or self.is_last_iter()):
            self._do_eval()
            self.save_model()

    def after_epoch(self) -> None:
        if self.period_unit == "epoch" and (self.every_n_epochs(self._period) or self.is_last_epoch()):
            self._do_eval()
            self.save_model()

    def _do_eval(self) -> None:
        """Run the evaluation and log what it yields."""
        step = self.trainer.epoch if self.period_unit == "epoch" else self.trainer.cur_iter
        self.log(step, **self.evaluate(), smooth=False, window_size=1)

    def batches(self, dataloader: Iterable[Any], desc: str) -> Iterator[Any]:
        """A loader's batches, of several ranks this rank's part, on the model's device, with a bar.

        A signal that ends the run is noticed between two of them.

        Raises:
            SettingError: at the end, if the ranks together have not seen each batch once.
        """
        strategy = self.trainer.hook_strategy
        dealt = deal(dataloader, strategy, own_shards=self.own_shards)
        is_shown = self.progress_bar and self.trainer.check_main()
        with ProgressBar(total=length_of(dealt), desc=desc, leave=False, disable=not is_shown) as bar:
            try:
                for batch in dealt:
                    self.trainer.check_stop()
                    yield move_to_device(batch, self.trainer.device)
                    bar.update()
            except RuntimeError:  # the signal may have ended the loader's workers as well
                self.trainer.check_stop()
                raise
        if strategy.world_size > 1 and not self.own_shards:
            check_reports(strategy.gather(dealt.report()), desc)


class EvalHook(EvaluationHook):
    """Evaluates every `period` epochs and after the last one, logs each score's mean over all samples, then saves.

    See `EvaluationHook` for when it runs and what it leaves undisturbed; `EvalTotalHook` for scores that are no mean over
    samples.

    Args:
        dataloader: any iterable of batches that can be iterated again and again.
        eval_func: (model, batch) -> {name: one score for each sample of the batch}. The batch is on the model's device.
        period: epochs between evaluations.
        max_to_keep, max_first, save_last: as for CheckpointerHook.
        save_metric: the name, as `eval_func` returns it, that `best.pth` follows; None: no metric decides.
        prefix: scores are logged as `<prefix>_<name>`.
        settings: `period_unit`, `inference_mode`, `progress_bar` of EvaluationHook.

    Stores: what CheckpointerHook stores.
    """

    identified_by = ("prefix",)

    def __init__(
        self,
        dataloader: Iterable[Any],
        eval_func: Callable[[nn.Module, Any], Scores],
        period: int = 1,
        max_to_keep: int | None = None,
        save_metric: str | None = None,
        max_first: bool = True,
        save_last: bool = True,
        prefix: str = "eval",
        **settings: Any,
    ) -> None:
        self.prefix = f"{prefix}_"
        full_name = None if save_metric is None else self.prefix + save_metric
        super().__init__(period, max_to_keep, full_name, max_first, save_last, **settings)
        if not callable(eval_func):
            raise TypeError(f"eval_func is {eval_func!r}; it has to be a function of (model, batch).")
        check_dataloader(dataloader)
        self._eval_func = eval_func
        self.dataloader = dataloader

    def trial(self) -> set[str]:
        with evaluating(self.trainer.model_evaluate, self.inference_mode):
            batch = first_batch(self.dataloader)
            scores = _checked(self._eval_func(self.trainer.model_evaluate, move_to_device(batch, self.trainer.device)))
        return {self.prefix + name for name in scores}

    def evaluate(self) -> dict[str, float]:
        model, strategy = self.trainer.model_evaluate, self.trainer.hook_strategy
        scores: dict[str, list[Any]] = {}
        with evaluating(model, self.inference_mode), same_buffers(model, strategy):
            for batch in self.batches(self.dataloader, self.prefix.rstrip("_")):
                for name, of_samples in _checked(self._eval_func(model, batch)).items():
                    scores.setdefault(name, []).append(of_samples)
        of_ranks = strategy.collect({name: _numbers(parts) for name, parts in scores.items()})
        merged = {name: [ranks[name] for ranks in of_ranks if name in ranks] for ranks in of_ranks for name in ranks}
        means = {self.prefix + name: _mean(torch.cat(parts).tolist()) for name, parts in merged.items()}
        means = strategy.broadcast(means)
        if not means:
            raise SettingError(
                "The evaluation yielded no score: its dataloader is empty, or eval_func returned no names."
            )
        return means


def evaluate_all(hooks: Iterable[HookBase]) -> dict[str, float]:
    """Run the evaluations of hooks now: full name -> value.

    Raises:
        SettingError: if no hook evaluates.
    """
    evaluating_hooks = [hook for hook in hooks if isinstance(hook, EvaluationHook)]
    if not evaluating_hooks:
        raise SettingError("No hook evaluates. Register one: hooks=[EvalHook(...)] or EvalTotalHook(...).")
    return {name: value for hook in evaluating_hooks for name, value in hook.evaluate().items()}


def check_dataloader(dataloader: Any) -> None:
    """An evaluation's loader can be iterated again and again."""
    if isinstance(dataloader, Iterator):
        raise SettingError(
            "dataloader is an iterator, which is used up after one evaluation. Pass a DataLoader, a list, or an object whose "
            "__iter__ begins anew."
        )
    if not isinstance(dataloader, Iterable) and not hasattr(dataloader, "__getitem__"):
        raise TypeError(f"dataloader is {dataloader!r}; it has to be a DataLoader or another iterable of batches.")


def first_batch(dataloader: Iterable[Any]) -> Any:
    """The first batch.

    Raises:
        SettingError: if there is none.
    """
    for batch in dataloader:
        return batch
    raise SettingError("The evaluation's dataloader is empty.")


@contextlib.contextmanager
def evaluating(model: nn.Module, inference_mode: bool = False) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's mode and all random-number states as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved_rng(), torch.inference_mode() if inference_mode else torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def same_buffers(model: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Rank 0's buffers on all ranks inside: its statistics are those that are saved with the weights."""
    if strategy.world_size == 1 or next(model.buffers(), None) is None:
        yield
        return
    own = BufferSnapshot(model)
    own.take()
    buffers = dict(model.named_buffers())
    for name, value in strategy.broadcast(buffers).items():
        buffers[name].data.copy_(value)
    try:
        yield
    finally:
        own.put_back()


def _checked(result: Any) -> Scores:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"eval_func returned {type(result).__name__}; it has to return a dict: name -> one score for each sample."
        )
    for name, scores in result.items():
        if isinstance(scores, Tensor | np.ndarray):
            one_for_each = scores.ndim == 1
        else:
            one_for_each = isinstance(scores, Sequence) and not isinstance(scores, str)
        if not one_for_each:
            shape = f" of shape {tuple(scores.shape)}" if isinstance(scores, Tensor | np.ndarray) else ""
            raise TypeError(
                f"eval_func returned {name!r} as {type(scores).__name__}{shape}; it has to be a list "
                "(or a 1-d tensor) with one score for each sample. A mean of the batch would "
                "give a wrong mean over all samples if batches differ in size."
            )
    return result


def _numbers(parts: list[Any]) -> Tensor:
    """(N,) float64 on the CPU: the scores of all batches, sample by sample."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    values = [torch.cat(tensors).double().cpu()] if tensors else []
    others = [float(score) for part in parts if not isinstance(part, Tensor) for score in part]
    return torch.cat([*values, torch.tensor(others, dtype=torch.float64)])


def _mean(scores: Iterable[float]) -> float:
    """The mean of all scores, each counted once, rounded once: the same however the samples are spread over ranks."""
    values = list(scores)
    return math.fsum(values) / len(values) if values else math.nan
