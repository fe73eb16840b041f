"""What evaluations have in common: when they run, under which conditions, over which batches, and that their names differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

from torch_frame.data.move import move_to_device
from torch_frame.data.rng import preserved_rng
from torch_frame.data.shards import check_reports, deal, whole
from torch_frame.data.source import length_of
from torch_frame.data.workers import iterate
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import SettingError
from torch_frame.hooks.base import HookBase, is_ours
from torch_frame.hooks.best import calls_inherited
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.hooks.logger import LoggerHook
from torch_frame.hooks.trial import is_late, names_if_it_works
from torch_frame.tracking.bar import ProgressBar
from torch_frame.training.buffers import BufferSnapshot
from torch_frame.training.modes import modes_of, set_modes

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class EvaluationHook(CheckpointerHook):
    """Base of hooks that evaluate: when they do, under which conditions, and what follows from the scores.

    Runs after each `period`-th epoch and after the last one, or, with `period_unit="iter"`, after each `period`-th batch of the
    run (if gradients are accumulated: when their window is complete) and after the last one. The model is EMA's if EMA is on, in
    eval mode, without gradients, in the precision of its weights or under the training's autocast (`precision`); training mode
    and random numbers of the training are as if there had been no evaluation. With `Trainer(limit_batches=)` the first batches
    are evaluated.

    One batch is evaluated before the first step as well, if `best.pth` follows a score, or if LoggerHook shows a line before the
    first evaluation, whose names it wants to know. Nothing of it is logged or saved; random numbers, buffers and the loader's
    generators are as before afterwards. A subclass that does not want that overrides `trial`, to return the names.

    Subclasses write `evaluate` and `trial`.

    On several ranks that all have the hook, each evaluates some of the batches, with the buffers (batch norm's statistics) of
    rank 0, and all get the scores of the whole. If only rank 0 has it, rank 0 evaluates all batches, and the others wait.

    Args:
        period: epochs, or batches, between evaluations; 0: only after the last one.
        max_to_keep, max_first, save_last: as for CheckpointerHook.
        save_metric: the full name that `best.pth` follows; None: no metric decides.
        period_unit: "epoch" or "iter".
        inference_mode: evaluate in `torch.inference_mode`, which is a little faster than `no_grad`; a tensor that the model
            caches meanwhile (a grid of YOLOX) cannot be used in training afterwards.
        progress_bar: show one.
        precision: None: that of the weights; "train": under the training's autocast, as the steps are computed.
        own_shards: the dataloader gives each rank a part of its own already; else it yields the whole data on all ranks.
        to_device: give the batches on the model's device; False: as the loader yields them.

    Stores: what CheckpointerHook stores.
    """

    evaluates = True
    _kept_otherwise = CheckpointerHook._kept_otherwise | {
        "_score_names",
        "_columns",
        "_is_due",
        "_evaluated_at",
    }

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
        to_device: bool = True,
        precision: Literal["train"] | None = None,
    ) -> None:
        super().__init__(period, max_to_keep, save_metric, max_first, save_last)
        if period_unit not in ("epoch", "iter"):
            raise SettingError(f"period_unit is {period_unit!r}; it has to be 'epoch' or 'iter'.")
        if precision not in (None, "train"):
            raise SettingError(
                f"precision is {precision!r}; it has to be None (that of the weights) or 'train' (the training's autocast)."
            )
        self.period_unit = period_unit
        self.precision = precision
        self._is_due = False
        self._evaluated_at: int | None = None
        self.inference_mode = inference_mode
        self.progress_bar = progress_bar
        self.own_shards = own_shards
        self.to_device = to_device
        self._score_names: set[str] | None = None
        self._columns: tuple[str, ...] = ()
        own_after_iter = type(self).after_iter is EvaluationHook.after_iter
        self.idle_stages = frozenset({"after_iter"} if period_unit == "epoch" and own_after_iter else ())

    @property
    def asks_in_steps(self) -> bool:
        return self.period_unit == "iter"

    def evaluate(self) -> dict[str, float]:
        """Evaluate now: full name -> value. Nothing is logged or saved."""
        raise NotImplementedError(f"{self.class_name} has no evaluate().")

    def trial(self) -> Set[str] | None:
        """The full names of the scores, found out on one batch; None: not known."""
        raise NotImplementedError(f"{self.class_name} has no trial().")

    def names_known(self) -> Set[str] | None:
        """The full names of the scores, as far as they can be told without a batch; None: not at all."""
        return None

    def loaders(self) -> dict[str, Iterable[Any]]:
        """prefix -> dataloader: what will be evaluated."""
        return {}

    def metric_prefixes(self) -> list[str]:
        return [prefix for prefix in self.loaders() if prefix]

    def _evaluates_by_itself(self) -> bool:
        """The evaluation is a subclass's: a `_do_eval`, as in 1.7, that does not call the inherited one."""
        return not calls_inherited(self, EvaluationHook._do_eval)

    def check(self) -> None:
        super().check()
        for prefix, loader in {} if self._evaluates_by_itself() else self.loaders().items():
            if length_of(loader) == 0:
                raise SettingError(
                    f"The evaluation {prefix!r} of {self.class_name} has no batch: its dataloader is empty. "
                    "Has its dataset fewer samples than a batch, with drop_last=True?"
                )

    def before_train(self) -> None:
        """Evaluate one batch, so that a wrong name or form is told now and not after the first epoch."""
        super().before_train()
        self._check_unit()
        if type(self)._do_eval is not EvaluationHook._do_eval:
            return
        rivals = [hook for hook in self.trainer.hooks if isinstance(hook, EvaluationHook) and hook is not self]
        may_clash = any(_overlap(self.metric_prefixes(), hook.metric_prefixes()) for hook in rivals)
        if self.save_metric is None and not may_clash:
            self._find_columns()
            return
        names = self.trial()
        self._columns, self._score_names = tuple(names or ()), None if names is None else set(names)
        check_apart(self, rivals)
        if self.save_metric is not None:
            self._check_save_metric()

    def _find_columns(self) -> None:
        """What is known of the names before the first evaluation, for the table's columns."""
        known, prefixes = self.names_known(), self.metric_prefixes()
        in_this_epoch = self.period_unit == "epoch" and (self.every_n_epochs(self._period) or self.is_last_epoch())
        if known is None and is_late(self.trainer, prefixes, in_this_epoch=in_this_epoch):
            known = names_if_it_works(self.trial, f"{self.class_name} ({', '.join(prefixes)})")
        else:
            self._check_first_batches()
        self._columns = tuple(known or ())

    def _check_first_batches(self) -> None:
        """A loader without a length says only by its first batch that it has one."""
        for loader in self.loaders().values():
            if length_of(loader) is None:
                with preserved_rng():
                    first_batch(loader)

    def _check_unit(self) -> None:
        """A resumed run's scores go on in the unit that they were logged in: of epochs behind iterations none would be newer."""
        if self.period_unit != "epoch" or self.trainer.resumed_iter is None:
            return
        known = {prefix for hook in self.trainer.hooks for prefix in hook.metric_prefixes()}
        for name, logged_at in self.metric_storage.latest_iters().items():
            of_name = [prefix for prefix in known if name.startswith(f"{prefix}_")]
            prefix = max(of_name, key=len, default=None)  # "val_ood" before "val"
            if prefix in self.metric_prefixes() and logged_at > self.trainer.epoch:
                raise SettingError(
                    f"{name!r} was logged by iterations, the last time at {logged_at}, and {self.class_name} would log it by "
                    "epochs now, which no reader would take for newer. Pass period_unit='iter' again, or another prefix."
                )

    def _check_save_metric(self) -> None:
        assert self.save_metric is not None
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

    def expected_names(self) -> Iterable[str]:
        return self._columns or super().expected_names()

    def after_iter(self) -> None:
        if self.period_unit == "iter":
            self._is_due = self._is_due or self.every_n_iters(self._period) or self.is_last_iter()
            # Inside a window other weights would be saved than those scored.
            if not self.trainer.window_open and self._begins():
                self._do_eval()
                self.save_model()

    def after_epoch(self) -> None:
        if self.period_unit == "epoch":
            self._is_due = self.every_n_epochs(self._period) or self.is_last_epoch()
        elif self.is_last_epoch() and self._evaluated_at != self.trainer.progress.iter:
            self._is_due = True  # behind the last batch of a loader without a length, which is known only now
        if self._begins():
            self._do_eval()
            self.save_model()

    def _begins(self) -> bool:
        """An evaluation is due; it is noted as done."""
        is_due, self._is_due = self._is_due, False
        if is_due:
            self._evaluated_at = self.trainer.progress.iter
            self._keep_last_scores()
        return is_due

    def _keep_last_scores(self) -> None:
        """Several evaluations between two log points: each one's scores are written."""
        for hook in self.trainer.hooks if self.period_unit == "iter" else ():
            if isinstance(hook, LoggerHook):
                hook.write_scores()

    def evaluated_at(self, name: str) -> int | None:
        is_own = any(name.startswith(f"{prefix}_") for prefix in self.metric_prefixes())
        return self._evaluated_at if is_own else None

    def _do_eval(self) -> None:
        """Run the evaluation and log what it yields."""
        self._evaluated_at = self.trainer.progress.iter  # an override of after_epoch may come here directly
        step = self.trainer.epoch if self.period_unit == "epoch" else self.trainer.cur_iter
        self.log(step, **self.evaluate(), smooth=False, window_size=1)
        self._write_pictures(step)

    def _write_pictures(self, step: int) -> None:
        """Hand over what the evaluation has drawn; here nothing."""

    def placed(self, batch: Any) -> Any:
        """The batch where it is wanted: on the model's device, or as it is."""
        return move_to_device(batch, self.trainer.device) if self.to_device else batch

    def evaluating(self) -> AbstractContextManager[None]:
        """The conditions of the evaluation: eval mode, no gradients, its precision; everything as before afterwards."""
        trainer = self.trainer
        autocast = trainer.strategy.autocast(trainer.precision.autocast()) if self.precision == "train" else None
        alone = None if trainer.hook_strategy is trainer.strategy else trainer.strategy.alone()
        return evaluating(trainer.model_evaluate, self.inference_mode, autocast, trainer.schedule_free.shown(), alone)

    def batches(self, dataloader: Iterable[Any], desc: str) -> Iterator[Any]:
        """A loader's batches, of several ranks this rank's part, on the model's device, with a bar.

        A signal that ends the run is noticed between two of them.

        Raises:
            SettingError: at the end, if the ranks together have not seen each batch once.
        """
        strategy = self.trainer.hook_strategy
        dealt = deal(dataloader, strategy, own_shards=self.own_shards, limit=self.trainer.length.limit_batches)
        is_shown = self.progress_bar and self.trainer.check_main()
        with ProgressBar(total=length_of(dealt), desc=desc, leave=False, disable=not is_shown) as bar:
            try:
                for batch in dealt:
                    self.trainer.check_stop()
                    yield self.placed(batch)
                    bar.update()
            except RuntimeError:  # the signal may have ended the loader's workers as well
                self.trainer.check_stop()
                raise
        if strategy.world_size > 1 and not self.own_shards:
            check_reports(strategy.gather(dealt.report()), desc)


def evaluate_all(hooks: Iterable[HookBase]) -> dict[str, float]:
    """Run the evaluations of hooks now: full name -> value.

    Raises:
        SettingError: if no hook evaluates.
    """
    evaluating_hooks = [hook for hook in hooks if isinstance(hook, EvaluationHook)]
    if not evaluating_hooks:
        raise SettingError("No hook evaluates. Register one: hooks=[EvalHook(...)] or EvalTotalHook(...).")
    values: dict[str, float] = {}
    for hook in evaluating_hooks:
        evaluate: Any = type(hook).evaluate
        if hook._evaluates_by_itself() and is_ours(evaluate):
            raise SettingError(
                f"{hook.class_name} evaluates in a _do_eval of its own, which logs and returns nothing, so evaluate() would be "
                "another evaluation. Override evaluate() instead, to return {name: value}: _do_eval logs that."
            )
        found = hook.evaluate()
        both = sorted(found.keys() & values.keys())
        if both:
            raise SettingError(two_of_one_name(both))
        values |= found
    return values


def evaluates_in_steps(hook: HookBase, metric: str) -> bool:
    """The hook evaluates by iterations and may log this name."""
    in_steps = isinstance(hook, EvaluationHook) and hook.period_unit == "iter"
    return in_steps and any(metric.startswith(f"{prefix}_") for prefix in hook.metric_prefixes())


def check_apart(hook: EvaluationHook, rivals: Iterable[EvaluationHook]) -> None:
    """No two evaluations yield a value of the same name.

    Raises:
        SettingError: naming it.
    """
    for rival in rivals:
        both = sorted((hook._score_names or set()) & (rival._score_names or set()))
        if both:
            raise SettingError(two_of_one_name(both))


def two_of_one_name(names: Iterable[str]) -> str:
    """What is said of values that would hide each other."""
    return (
        f"Two evaluations yield {', '.join(map(repr, names))}, so one value would hide the other. Give one of the hooks another "
        "prefix: EvalHook(..., prefix='test'); or, of several dataloaders of one hook, one of them another name."
    )


def _overlap(prefixes: Iterable[str], others: Iterable[str]) -> bool:
    """Names that begin with these may be the same: equal, or `val` beside `val_ood`."""
    others = list(others)
    return any(
        a == b or a.startswith(f"{b}_") or b.startswith(f"{a}_") or not a or not b for a in prefixes for b in others
    )


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
    for batch in iterate(whole(dataloader)):
        return batch
    raise SettingError("The evaluation's dataloader is empty.")


@contextlib.contextmanager
def evaluating(
    model: nn.Module,
    inference_mode: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    weights: AbstractContextManager[None] | None = None,
    alone: AbstractContextManager[None] | None = None,
) -> Iterator[None]:
    """Eval mode, no gradients, the weights to evaluate; modes, random-number states and weights as before afterwards."""
    modes = modes_of(model)
    with (
        alone or _NOTHING,  # in a step, too, the other ranks wait however long it takes
        weights or _NOTHING,
        preserved_rng(),
        torch.inference_mode() if inference_mode else torch.no_grad(),
        autocast or _NOTHING,
    ):
        model.eval()
        try:
            yield
        finally:
            set_modes(modes)


@contextlib.contextmanager
def same_buffers(model: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Rank 0's buffers on all ranks inside: its statistics are those that are saved with the weights.

    A buffer that is not saved may have another size on each rank, or be on some of them only: a cache that grows with the data.

    Raises:
        SettingError: if one that is saved has another size than on rank 0.
    """
    if strategy.world_size == 1 or next(model.buffers(), None) is None:
        yield
        return
    own = BufferSnapshot(model)
    own.take()
    buffers = dict(model.named_buffers())
    for name, value in strategy.broadcast(buffers).items():
        if name in buffers and buffers[name].shape == value.shape:
            buffers[name].data.copy_(value)
        elif name in model.state_dict():
            raise SettingError(
                f"The buffer {name!r} has shape {tuple(value.shape)} on rank 0 and {tuple(buffers[name].shape)} on rank "
                f"{strategy.rank}, so the ranks would evaluate different models. Let it have one size on all of them."
            )
    try:
        yield
    finally:
        own.put_back()
