"""EvalHook: the mean of each sample's score on held-out data, and the best model by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_frame.errors import SettingError
from torch_frame.hooks.evaluation import EvaluationHook, check_dataloader, first_batch, same_buffers
from torch_frame.hooks.trial import leaving_no_trace

Scores = Mapping[str, Any]
"""name -> the scores of a batch's samples: a list of numbers, an array or a tensor; of more dimensions all numbers count."""


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
        settings: `period_unit`, `inference_mode`, `progress_bar`, `precision`, `own_shards` of EvaluationHook.

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
        if not self._evaluates_by_itself():
            if not callable(eval_func):
                raise TypeError(f"eval_func is {eval_func!r}; it has to be a function of (model, batch).")
            check_dataloader(dataloader)
        self._eval_func = eval_func
        self.dataloader = dataloader

    def loaders(self) -> dict[str, Iterable[Any]]:
        return {self.prefix.removesuffix("_"): self.dataloader}

    def trial(self) -> Set[str] | None:
        model = self.trainer.model_evaluate
        with self.evaluating(), leaving_no_trace(model, [self.dataloader]):
            batch = first_batch(self.dataloader)
            scores = _checked(self._eval_func(model, self.placed(batch)))
        names = {f"{self.prefix}{name}": None for name in scores}.keys()  # in their order
        return names or None  # nothing for the first batch: the others will tell

    def evaluate(self) -> dict[str, float]:
        model, strategy = self.trainer.model_evaluate, self.trainer.hook_strategy
        scores: dict[str, list[Any]] = {}
        with self.evaluating(), same_buffers(model, strategy):
            for batch in self.batches(self.dataloader, self.prefix.rstrip("_")):
                for name, of_samples in _checked(self._eval_func(model, batch)).items():
                    scores.setdefault(name, []).append(_kept(of_samples))
        of_ranks = strategy.collect({name: _numbers(parts, name) for name, parts in scores.items()})
        merged = {name: [ranks[name] for ranks in of_ranks if name in ranks] for ranks in of_ranks for name in ranks}
        means = {f"{self.prefix}{name}": _mean(torch.cat(parts).tolist()) for name, parts in merged.items()}
        means = strategy.broadcast(means)
        if not means:
            raise SettingError(
                "The evaluation yielded no score: its dataloader is empty, or eval_func returned no names."
            )
        return means


def _checked(result: Any) -> Scores:
    """The scores by name; what can be read only once (a map, a generator) as a list."""
    if not isinstance(result, Mapping):
        raise TypeError(
            f"eval_func returned {type(result).__name__}; it has to return a dict: name -> one score for each sample."
        )
    scores = dict(result)
    for name, of_samples in result.items():
        if not isinstance(name, str):
            raise TypeError(
                f"eval_func returned a score called {name!r}, a {type(name).__name__}; names have to be texts."
            )
        if isinstance(of_samples, Iterator):
            scores[name] = list(of_samples)
        elif isinstance(of_samples, Tensor | np.ndarray):
            if of_samples.ndim == 0 or "complex" in str(of_samples.dtype):
                raise TypeError(_not_of_samples(name, of_samples))
        # of a set's equal scores one is left
        elif not isinstance(of_samples, Iterable) or isinstance(of_samples, str | bytes | Mapping | Set):
            raise TypeError(_not_of_samples(name, of_samples))
    return scores


def _kept(scores: Any) -> Any:
    """The scores as they are now: a model may write those of its next batch into the same tensor."""
    if isinstance(scores, Tensor):
        return scores.detach().clone()
    if isinstance(scores, np.ndarray):
        return scores.copy()
    return [_kept(score) for score in scores] if isinstance(scores, list | tuple) else scores


def _not_of_samples(name: str, scores: Any) -> str:
    shape = f" of shape {tuple(scores.shape)} and {scores.dtype}" if isinstance(scores, Tensor | np.ndarray) else ""
    return (
        f"eval_func returned {name!r} as {type(scores).__name__}{shape}; it has to be a list "
        "(or a tensor or an array) with one score for each sample. A mean of the batch would "
        "give a wrong mean over all samples if batches differ in size."
    )


def _numbers(parts: list[Any], name: str) -> Tensor:
    """(N,) float64 on the CPU: the scores of all batches, sample by sample, those of two dimensions and lists of lists flat."""
    tensors = [part.reshape(-1) for part in parts if isinstance(part, Tensor)]
    if len({(part.dtype, part.device) for part in tensors}) > 1:  # joined as they are, bfloat16 would round integers
        tensors = [part.cpu().double() for part in tensors]
    values = [torch.cat(tensors).cpu().double()] if tensors else []
    others = [score for part in parts if not isinstance(part, Tensor) for score in _flat(part, name)]
    return torch.cat([*values, torch.tensor(others, dtype=torch.float64)])


def _flat(scores: Any, name: str) -> Iterator[float]:
    for score in scores.reshape(-1).tolist() if isinstance(scores, Tensor | np.ndarray) else scores:
        if isinstance(score, list | tuple) or (isinstance(score, Tensor | np.ndarray) and score.ndim):
            yield from _flat(score, name)
            continue
        try:
            yield float(score)
        except (TypeError, ValueError):
            raise TypeError(
                f"eval_func returned {name!r} with {score!r} among the scores; each has to be a number."
            ) from None


def _mean(scores: Iterable[float]) -> float:
    """The mean of all scores, each counted once, rounded once: the same however the samples are spread over ranks."""
    values = list(scores)
    return math.fsum(values) / len(values) if values else math.nan
