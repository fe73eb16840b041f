"""EvalHook: scores on held-out data, and the best model by them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_frame.data.move import move_to_device
from torch_frame.data.seeding import preserved_rng
from torch_frame.errors import SettingError
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.tracking.bar import ProgressBar

Scores = Mapping[str, Any]
"""name -> the scores of a batch's samples: a list of numbers, a 1-d array or a 1-d tensor."""


class EvalHook(CheckpointerHook):
    """Evaluates every `period` epochs and after the last one, logs each score's mean over all samples, then saves.

    Runs after each epoch. The model is EMA's where EMA is on, in eval mode, without gradients, in the precision of its weights
    (use `torch.autocast` in `eval_func` for another); training mode and random numbers of the training are as if there had been
    no evaluation.

    Args:
        dataloader: any iterable of batches that can be iterated again and again.
        eval_func: (model, batch) -> {name: one score for each sample of the batch}. The batch is on the model's device.
        period: epochs between evaluations.
        max_to_keep, max_first, save_last: as for CheckpointerHook.
        save_metric: the name, as `eval_func` returns it, that `best.pth` follows; None: no metric decides.
        prefix: scores are logged as `<prefix>_<name>`.

    Stores: what CheckpointerHook stores.
    """

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
    ) -> None:
        self.prefix = f"{prefix}_"
        full_name = None if save_metric is None else self.prefix + save_metric
        super().__init__(period, max_to_keep, full_name, max_first, save_last)
        if not callable(eval_func):
            raise TypeError(f"eval_func is {eval_func!r}; it has to be a function of (model, batch).")
        if isinstance(dataloader, Iterator):
            raise SettingError(
                "dataloader is an iterator, which is used up after one evaluation. Pass a DataLoader, a list, or an object whose "
                "__iter__ begins anew."
            )
        self._eval_func = eval_func
        self._score_names: set[str] | None = None
        self.dataloader = dataloader

    def before_train(self) -> None:
        """Evaluate one batch, so that a wrong name or form is told now and not after the first epoch."""
        super().before_train()
        if self.save_metric is None or type(self)._do_eval is not EvalHook._do_eval:
            return
        with evaluating(self.trainer.model_evaluate):
            batch = next(iter(self.dataloader), None)
            if batch is None:
                raise SettingError("The evaluation's dataloader is empty.")
            scores = _checked(self._eval_func(self.trainer.model_evaluate, move_to_device(batch, self.trainer.device)))
        self._score_names = {self.prefix + name for name in scores}
        if self.save_metric.removeprefix(self.prefix) not in scores:
            raise SettingError(
                f"save_metric is {self.save_metric.removeprefix(self.prefix)!r}, but eval_func returns "
                f"{', '.join(map(repr, scores)) or 'nothing'}."
            )

    def logged_metrics(self) -> set[str] | None:
        return self._score_names

    def after_epoch(self) -> None:
        if self.every_n_epochs(self._period) or self.is_last_epoch():
            self._do_eval()
            self.save_model()

    def _do_eval(self) -> None:
        """Run the evaluation and log its means."""
        means = self._mean_scores(self.trainer.model_evaluate)
        self.log(
            self.trainer.epoch,
            **{self.prefix + name: mean for name, mean in means.items()},
            smooth=False,
            window_size=1,
        )

    def _mean_scores(self, model: nn.Module) -> dict[str, float]:
        scores: dict[str, list[Any]] = {}
        total = _length(self.dataloader)
        with evaluating(model), ProgressBar(total=total, desc=self.prefix.rstrip("_"), leave=False) as bar:
            for batch in self.dataloader:
                self.trainer.check_stop()
                result = self._eval_func(model, move_to_device(batch, self.trainer.device))
                for name, of_samples in _checked(result).items():
                    scores.setdefault(name, []).append(of_samples)
                bar.update()
        if not scores:
            raise SettingError(
                "The evaluation yielded no score: its dataloader is empty, or eval_func returned no names."
            )
        return {name: _mean(parts) for name, parts in scores.items()}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each module's mode and all random-number states as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _length(dataloader: Iterable[Any]) -> int | None:
    try:
        return len(dataloader)  # type: ignore[arg-type]  # asked, and it may have none
    except TypeError:
        return None


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
                "give a wrong mean over all samples where batches differ in size."
            )
    return result


def _mean(parts: list[Any]) -> float:
    """The mean over all samples, each counted once, rounded once."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    values: list[float] = torch.cat(tensors).double().tolist() if tensors else []
    for part in parts:
        if not isinstance(part, Tensor):
            values.extend(float(score) for score in part)
    return math.fsum(values) / len(values) if values else math.nan
