"""EvalTotalHook: metrics that are computed once all data has been seen."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_frame.checkpoint.values import decode, encode
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.hooks.evaluation import EvaluationHook, check_dataloader, first_batch, same_buffers
from torch_frame.hooks.figures import check_can_draw, check_figures, checked_figure
from torch_frame.hooks.trial import leaving_no_trace
from torch_frame.metrics._torchmetrics import alone, has_states, put_together, states_of
from torch_frame.metrics.metric import Metric, is_torchmetrics, results_of

_logger = logging.getLogger("torch_frame")


class EvalTotalHook(EvaluationHook):
    """Shows all batches to one or several metrics, computes them, logs every result that is one number, then saves.

    See `EvaluationHook` for when it runs and what it leaves undisturbed; `EvalHook` for scores of single samples.

    A metric is one of torch_frame.metrics, one of torchmetrics, a `MetricCollection`, or one of 1.7 (`update(model, batch)` and
    `evaluate()`). With `inputs` it is updated with what that function returns, and the model runs once for all metrics; without,
    with `update(model, batch)`.

    Args:
        dataloader: an iterable of batches that can be iterated again and again, or several: {prefix: dataloader}.
        eval_metric: a metric, a list of metrics, or {name: metric}: results are then called `<name>_<result>` (a metric with a
            single result gives it the name only).
        period: epochs, or batches with `period_unit="iter"`, between evaluations.
        max_to_keep, max_first, save_last: as for CheckpointerHook.
        save_metric: the result that `best.pth` follows, without prefix if there is one dataloader, with it if there are
            several; None: no metric decides.
        prefix: results are logged as `<prefix>_<result>`.
        inputs: (model, batch) -> the arguments of the metrics' `update`: a tuple, a dict of keyword arguments, or a single one.
        figures: {name: function}: after each evaluation the function is called on the main process with `eval_metric`, which has
            seen all data, and returns a matplotlib figure (or None), which the LoggerHook's writers get as `<prefix>_<name>`.
            `torch_frame.report.precision_recall.plot_precision_recall` is one for `MeanAveragePrecision`.
        settings: `period_unit`, `inference_mode`, `progress_bar`, `precision`, `own_shards` of EvaluationHook.

    Attributes:
        results: of the last evaluation, as the metrics returned them: {prefix: {name: value}}, matrices and lists included; on
            ranks other than 0 the numbers only.
        pictures: the figures of the last evaluation, by name; on rank 0.

    Stores: what CheckpointerHook stores.

    A detection hook in three lines:

    >>> from torch_frame.metrics import MeanAveragePrecision
    >>> loader = []  # batches of (images, image ids, truth): lists of dicts with boxes, labels
    >>> hook = EvalTotalHook(
    ...     loader,
    ...     MeanAveragePrecision(["cat", "dog"]),
    ...     save_metric="map",
    ...     inputs=lambda model, batch: (batch[1], model(batch[0]), batch[2]),
    ... )
    """

    identified_by = ("_prefixes",)
    _kept_otherwise = EvaluationHook._kept_otherwise | {"results", "pictures"}

    def __init__(
        self,
        dataloader: Iterable[Any] | Mapping[str, Iterable[Any]],
        eval_metric: Any,
        period: int = 1,
        max_to_keep: int | None = None,
        save_metric: str | None = None,
        max_first: bool = True,
        save_last: bool = True,
        prefix: str = "eval",
        *,
        inputs: Callable[[nn.Module, Any], Any] | None = None,
        figures: Mapping[str, Callable[[Any], Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.prefix = f"{prefix}_"
        self.dataloaders = dict(dataloader) if isinstance(dataloader, Mapping) else {prefix: dataloader}
        self._prefixes = ", ".join(self.dataloaders)
        for loader in () if self._evaluates_by_itself() else self.dataloaders.values():
            check_dataloader(loader)
        self._metrics = _with_names(eval_metric, has_inputs=inputs is not None)
        if inputs is not None and not callable(inputs):
            raise TypeError(f"inputs is {inputs!r}; it has to be a function of (model, batch), or None.")
        self._inputs = inputs
        self._figures = check_figures(figures, self.class_name)
        self._given_metric = eval_metric
        self.pictures: dict[str, Any] = {}
        self.results: dict[str, dict[str, Any]] = {}
        super().__init__(period, max_to_keep, self._full_name(save_metric), max_first, save_last, **settings)

    def loaders(self) -> dict[str, Iterable[Any]]:
        return self.dataloaders

    @property
    def _eval_metric(self) -> Any:
        """The metric, or the list of several: 1.7's name."""
        metrics = [metric for _, metric in self._metrics]
        return metrics[0] if len(metrics) == 1 else metrics

    @property
    def dataloader(self) -> Iterable[Any]:
        """The dataloader; of several the first."""
        return next(iter(self.dataloaders.values()))

    def _full_name(self, save_metric: str | None) -> str | None:
        if save_metric is None:
            return None
        if len(self.dataloaders) == 1:
            return f"{next(iter(self.dataloaders))}_{save_metric}"
        if not any(save_metric.startswith(f"{prefix}_") for prefix in self.dataloaders):
            raise SettingError(
                f"save_metric is {save_metric!r}, but there are several dataloaders; begin it with one of their names: "
                f"{', '.join(repr(f'{prefix}_{save_metric}') for prefix in self.dataloaders)}."
            )
        return save_metric

    def check(self) -> None:
        super().check()
        check_can_draw(self._figures, self.class_name)
        check_can_merge([metric for _, metric in self._metrics], self.trainer.hook_strategy)

    def higher_is_better(self, name: str) -> bool | None:
        """What the metric that yields a result says of it, if it says anything (torchmetrics' do)."""
        said = {getattr(metric, "higher_is_better", None) for metric in self._metrics_of(name)} - {None}
        return said.pop() if len(said) == 1 else None

    def _metrics_of(self, full_name: str) -> list[Any]:
        """The metrics that could have produced a result: those with its name, else the only one; [] if it cannot be told."""
        names = [full_name.removeprefix(f"{p}_") for p in self.dataloaders if full_name.startswith(f"{p}_")]
        parts = [part for given, metric in self._metrics for part in _parts(given, metric)]
        matching = [metric for known, metric in parts if known in names]
        return matching or ([parts[0][1]] if names and len(parts) == 1 else [])

    def names_known(self) -> Set[str] | None:
        names: dict[str, None] = {}
        try:
            for given, metric in self._metrics:
                names |= _renamed(given, metric, dict.fromkeys(metric.result_names()))
        except Exception:  # one does not say, or a subclass's compute() fails without data
            return None
        return {f"{prefix}_{name}": None for prefix in self.dataloaders for name in names}.keys()

    def trial(self) -> Set[str] | None:
        names: dict[str, float] = {}
        model, loaders = self.trainer.model_evaluate, self.dataloaders
        metrics = [metric for _, metric in self._metrics]
        with self.evaluating(), leaving_no_trace(model, loaders.values(), metrics), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that one batch is not enough for
            for prefix, loader in loaders.items():
                self._reset()
                try:
                    self._update(self.placed(first_batch(loader)))
                    try:
                        names = _joined(names, self._scalars(prefix, self._compute(merged=False)))
                    except SettingError:
                        raise
                    except Exception:  # one batch may be too little for it; a real evaluation will tell
                        return None
                    if self.save_metric is not None:
                        self._draw(prefix)
                finally:
                    self._reset()
        return names.keys()

    def evaluate(self) -> dict[str, float]:
        scalars: dict[str, float] = {}
        self.pictures = {}
        model, strategy = self.trainer.model_evaluate, self.trainer.hook_strategy
        check_can_merge([metric for _, metric in self._metrics], strategy)
        with self.evaluating(), same_buffers(model, strategy):
            for prefix, loader in self.dataloaders.items():
                self._reset()
                try:
                    seen = False
                    for batch in self.batches(loader, prefix):
                        self._update(batch)
                        seen = True
                    if not strategy.agree(seen):
                        raise SettingError(f"The evaluation's dataloader ({prefix}) is empty.")
                    merge_over_ranks([metric for _, metric in self._metrics], strategy)
                    self.results[prefix] = _detached_results(self._compute(merged=True))
                    self._draw(prefix)
                finally:
                    self._reset()
                found = strategy.broadcast(self._scalars(prefix, self.results[prefix]))
                if strategy.rank != 0:
                    self.results[prefix] = {name.removeprefix(f"{prefix}_"): value for name, value in found.items()}
                scalars = _joined(scalars, found)
        return scalars

    def _draw(self, prefix: str) -> None:
        if self.trainer.hook_strategy.rank != 0:
            return
        for name, function in self._figures.items():
            with alone(metric for _, metric in self._metrics):
                figure = checked_figure(name, function(self._given_metric))
            if figure is not None:
                self.pictures[f"{prefix}_{name}"] = figure

    def _write_pictures(self, step: int) -> None:
        """Under the names that values of these names have."""
        for name, figure in self.pictures.items():
            groups = [prefix for prefix in self.results if name.startswith(f"{prefix}_")]  # val_ood before val
            group = max(groups, key=len)
            self.trainer.add_figure(f"{group}/{name}", figure, step)

    def _update(self, batch: Any) -> None:
        model = self.trainer.model_evaluate
        if self._inputs is None:
            for _, metric in self._metrics:
                metric.update(model, batch)
            return
        arguments = self._inputs(model, batch)
        for _, metric in self._metrics:
            if isinstance(arguments, Mapping):
                metric.update(**arguments)
            elif isinstance(arguments, tuple):
                metric.update(*arguments)
            else:
                metric.update(arguments)

    def _compute(self, *, merged: bool) -> dict[str, Any]:
        """The results by name; if merged, on rank 0 only."""
        results: dict[str, Any] = {}
        if merged and self.trainer.hook_strategy.rank != 0:
            return results
        for given, metric in self._metrics:
            with alone([metric]):
                found = results_of(metric)
            for name, value in _renamed(given, metric, found).items():
                if name in results:
                    raise SettingError(
                        f"Two metrics of one evaluation yield {name!r}. Name them: eval_metric={{'first': ..., 'second': ...}}."
                    )
                results[name] = value
        return results

    def _scalars(self, prefix: str, results: Mapping[str, Any]) -> dict[str, float]:
        is_of_1_7 = not any(hasattr(metric, "compute") for _, metric in self._metrics)
        numbers = {name: _number(value, is_of_1_7=is_of_1_7) for name, value in results.items()}
        return {f"{prefix}_{name}": number for name, number in numbers.items() if number is not None}

    def _reset(self) -> None:
        for _, metric in self._metrics:
            if isinstance(metric, nn.Module):  # torchmetrics: its state is on the device of the model's outputs
                metric.to(self.trainer.device)
            if hasattr(metric, "reset"):
                metric.reset()


def _joined(of_some: dict[str, float], of_another: Mapping[str, float]) -> dict[str, float]:
    """The values of several dataloaders.

    Raises:
        SettingError: two of them yield one name.
    """
    both = sorted(of_some.keys() & of_another.keys())
    if both:
        raise SettingError(
            f"Two dataloaders of one evaluation yield {', '.join(map(repr, both))}, so one value would hide the other. Give "
            "one of them another name."
        )
    return {**of_some, **of_another}


def check_can_merge(metrics: Iterable[Any], strategy: Strategy) -> None:
    """Metrics that see parts of the data on several ranks can be put together.

    Raises:
        SettingError: for a metric whose state cannot be merged.
    """
    for metric in metrics:
        missing = _missing_to_merge(metric) if strategy.world_size > 1 else ""
        if missing:
            raise SettingError(
                f"{type(metric).__name__} would see one of {strategy.world_size} parts of the data, and {missing}, or give "
                "hooks to rank 0 and hooks=[] to the others: rank 0 then evaluates all of the data."
            )


def _missing_to_merge(metric: Any) -> str:
    """What keeps a metric's parts apart, and how to change it; empty if nothing does."""
    if is_torchmetrics(metric) and has_states(metric):
        return ""
    if not isinstance(metric, Metric):
        return (
            "has no merge(), state_dict() and load_state_dict() to put them together (see torch_frame.metrics.Metric). "
            "Write them"
        )
    if isinstance(metric, nn.Module) and type(metric).state_dict is nn.Module.state_dict and not metric.state_dict():
        return "its state_dict() is empty. Write one, and load_state_dict(), or keep what it counts in buffers"
    return ""


def merge_over_ranks(metrics: Sequence[Any], strategy: Strategy) -> None:
    """Give rank 0's metrics the state of all ranks; what a rank has seen counts once."""
    if strategy.world_size == 1:
        return
    of_torchmetrics = [is_torchmetrics(metric) and has_states(metric) for metric in metrics]
    own = [states_of(m) if is_theirs else m.state_dict() for m, is_theirs in zip(metrics, of_torchmetrics, strict=True)]
    sent = [encode(state, f"the state of {type(metric).__name__}") for metric, state in zip(metrics, own, strict=True)]
    of_metrics = zip(*map(decode, strategy.collect(sent)), strict=True)  # none on the other ranks
    for metric, is_theirs, of_ranks in zip(metrics, of_torchmetrics, of_metrics, strict=False):
        if is_theirs:
            put_together(metric, of_ranks)
            continue
        for state in of_ranks[1:]:
            other = copy.deepcopy(metric)
            other.reset()
            other.load_state_dict(state)
            metric.merge(other)


def _with_names(eval_metric: Any, *, has_inputs: bool) -> list[tuple[str | None, Any]]:
    """(name or None, metric) of what was given.

    Raises:
        TypeError: for a class, or something that is no metric.
    """
    named: list[tuple[str | None, Any]]
    if isinstance(eval_metric, Mapping) and not _is_metric(eval_metric):
        named = list(eval_metric.items())
    elif isinstance(eval_metric, Sequence):
        named = [(None, metric) for metric in eval_metric]
    else:
        named = [(None, eval_metric)]
    for _, metric in named:
        if isinstance(metric, type):
            raise TypeError(
                f"eval_metric is the class {metric.__name__}; make an object of it: {metric.__name__}(...)."
            )
        if not _is_metric(metric):
            raise TypeError(
                f"eval_metric is {metric!r}; it has to have update() and compute(), or update() and 1.7's evaluate()."
            )
        if not has_inputs and is_torchmetrics(metric):
            raise TypeError(
                f"{type(metric).__name__} is updated with predictions and truth. Say where they come from: "
                "inputs=lambda model, batch: (model(batch[0]), batch[1])."
            )
    if not named:
        raise SettingError("eval_metric is empty; give at least one metric.")
    if len({id(metric) for _, metric in named}) < len(named):
        raise SettingError("eval_metric has one object twice, which would see each batch twice. Make two of them.")
    return named


def _is_metric(metric: Any) -> bool:
    """A plain dict has `update` as well, but nothing to compute."""
    has = {name for name in ("update", "compute", "evaluate") if callable(getattr(metric, name, None))}
    return "update" in has and len(has) > 1


def _parts(given: str | None, metric: Any) -> list[tuple[str | None, Any]]:
    """A collection's metrics by the names of their results; of another one the name that it was given."""
    if isinstance(metric, Mapping | nn.ModuleDict):
        return [(name if given is None else f"{given}_{name}", part) for name, part in metric.items()]
    return [(given or type(metric).__name__, metric)]


def _renamed(given: str | None, metric: Any, results: dict[str, Any]) -> dict[str, Any]:
    if given is None:
        return results
    if list(results) == [type(metric).__name__]:
        return {given: next(iter(results.values()))}
    return {f"{given}_{name}": value for name, value in results.items()}


def _detached_results(results: dict[str, Any]) -> dict[str, Any]:
    """The results as they are now, whatever the metric does with its tensors next."""
    return {name: copy.deepcopy(_detached(value)) for name, value in results.items()}


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _number(value: Any, *, is_of_1_7: bool = False) -> float | None:
    """A result that is one number, or of a metric of 1.7 the mean of all its numbers; None for anything else."""
    if isinstance(value, Tensor):
        return float(value.item()) if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, Real):
        return float(value)
    if is_of_1_7 and isinstance(value, list | tuple | np.ndarray):
        return _mean_of_numbers(value)
    if isinstance(value, np.ndarray | np.generic):
        return float(value.item()) if value.size == 1 and value.dtype.kind in "biuf" else None
    if isinstance(value, list) and value and all(isinstance(item, Real) for item in value):
        return float(np.mean(value))
    return None


def _mean_of_numbers(value: Any) -> float | None:
    """1.7 logged np.mean of whatever a metric returned; None if that is no number."""
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return float(numbers.mean()) if numbers.size else None
