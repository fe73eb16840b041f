"""The seam is complete: a run whose ranks only meet in the strategy's methods is the run of one process on the whole batches."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.threads import ThreadStrategy, on_ranks
from tests.small_runs import Net, UserError, copied, differences, make_batches, make_trainer, weights_of
from torch_frame import CheckpointerHook, EvalHook, EvalTotalHook, HookBase, LoggerHook, NonFiniteError, Trainer
from torch_frame.distributed.strategy import SingleProcess, Strategy
from torch_frame.metrics import Metric

Batch = tuple[Tensor, Tensor]


def doubles(num: int = 5, size: int = 12, last: int | None = None) -> list[Batch]:
    return [(x.double(), y.double()) for x, y in make_batches(num, size, last=last)]


def part(batches: list[Batch], rank: int, world_size: int = 2, *, uneven: bool = False) -> list[Batch]:
    """A rank's part of each batch; uneven: rank 0 has one sample more than it should."""
    parts = []
    for x, y in batches:
        cuts = [len(x) * r // world_size for r in range(world_size + 1)]
        cuts[1:-1] = [cut + uneven for cut in cuts[1:-1]]
        own = slice(cuts[rank], cuts[rank + 1])
        parts.append((x[own], y[own]))
    return parts


def num_samples(batch: Batch) -> int:
    return len(batch[0])


_ONE_AT_A_TIME = threading.Lock()  # Net seeds the global generator, which ranks that are threads share


def double_net() -> Net:
    with _ONE_AT_A_TIME:
        return Net().double()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def weights(result: Any) -> dict[str, Tensor]:
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


def quiet(trainer: Trainer) -> None:
    trainer.train(5, 5)


# ---------------------------------------------------------------- the same weights

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated, the last window ragged": {"gradient_accumulation_steps": 3},
    "weighted": {"loss_weight": num_samples},
    "weighted and accumulated": {"loss_weight": num_samples, "gradient_accumulation_steps": 2},
    "clipped": {"clip_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    "ema and warm-up": {"use_ema": True, "ema_decay": 0.9, "warmup_method": "linear", "warmup_iters": 4},
    "skipping": {"on_nonfinite": "skip"},
}


def trained(
    work_dir: Path, batches: list[Batch], strategy: Strategy | None = None, **settings: Any
) -> dict[str, Tensor]:
    model = double_net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    trainer = make_trainer(work_dir, model, optimizer, scheduler, batches, strategy=strategy, **settings)
    quiet(trainer)
    return {**weights_of(model), **{f"ema.{k}": v for k, v in weights_of(trainer.model_evaluate).items()}}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ranks_end_with_the_weights_of_one_process_on_the_whole_batches(
    settings: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    uneven = "loss_weight" in settings
    whole = doubles(last=6)
    expected = trained(tmp_path / "one", whole, **settings)

    def work(strategy: ThreadStrategy) -> dict[str, Tensor]:
        own = part(whole, strategy.rank, world_size, uneven=uneven)
        return trained(tmp_path / f"rank_{strategy.rank}", own, strategy, **settings)

    results = on_ranks(work, world_size)
    assert all(distance(weights(result), expected) < 1e-12 for result in results)
    assert all(differences(weights(result), weights(results[0])) == [] for result in results)


def test_the_gradient_norm_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    whole = doubles()

    def norms(batches: list[Batch], strategy: Strategy | None = None) -> list[float]:
        trainer = make_trainer(
            tmp_path / "run", double_net(), data=batches, max_epochs=1, strategy=strategy, clip_grad_norm=1e9
        )
        quiet(trainer)
        return list(trainer.metric_storage["grad_norm"]._history)

    expected = norms(whole)
    for result in on_ranks(lambda strategy: norms(part(whole, strategy.rank), strategy)):
        assert result == pytest.approx(expected, rel=1e-12)


def test_a_loader_is_split_over_the_ranks_and_every_sample_is_trained_on_once(tmp_path: Path) -> None:
    data = TensorDataset(torch.arange(22.0, dtype=torch.float64).reshape(22, 1))

    def seen(strategy: ThreadStrategy) -> list[list[float]]:
        rows = []

        def step(model: nn.Module, batch: Any) -> Tensor:
            rows.append(batch[0].flatten().tolist())
            return model(batch[0]).square().mean()

        model = nn.Linear(1, 1).double()
        strategy.own_shards = False
        loader = DataLoader(data, batch_size=3, shuffle=True)
        quiet(make_trainer(tmp_path, model, None, None, loader, 2, strategy=strategy, seed=3, step_fn=step))
        return rows

    first, second = map(weights, on_ranks(seen))  # type: ignore[arg-type]
    steps = len(first) // 2
    assert len(first) == len(second) == 2 * 4
    for epoch in (0, 1):
        rows = [*first[epoch * steps : (epoch + 1) * steps], *second[epoch * steps : (epoch + 1) * steps]]
        assert sorted(value for row in rows for value in row) == list(map(float, range(22)))
    assert first[:steps] != first[steps:], "another order in each epoch"


# ---------------------------------------------------------------- what one rank finds, all do


def poisoned(batches: list[Batch], index: int) -> list[Batch]:
    made = copied(batches)
    made[index][0][0, 0] = math.nan
    return [tuple(batch) for batch in made]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(clip: float, accumulate: int, tmp_path: Path) -> None:
    whole = doubles()
    settings: dict[str, Any] = {
        "on_nonfinite": "skip",
        "clip_grad_norm": clip,
        "gradient_accumulation_steps": accumulate,
    }
    expected = trained(tmp_path / "one", poisoned(whole, 2), **settings)

    def work(strategy: ThreadStrategy) -> dict[str, Tensor]:
        own = part(whole, strategy.rank)
        return trained(tmp_path / "run", poisoned(own, 2) if strategy.rank == 0 else own, strategy, **settings)

    assert all(distance(weights(result), expected) < 1e-12 for result in on_ranks(work))


def test_a_step_that_is_bad_on_one_rank_raises_on_all_before_the_weights_are_touched(tmp_path: Path) -> None:
    whole = doubles()
    kept: dict[int, list[dict[str, Tensor]]] = {0: [], 1: []}

    def work(strategy: ThreadStrategy) -> None:
        own = part(whole, strategy.rank)
        model = double_net()
        bad = poisoned(own, 0) if strategy.rank == 1 else own
        trainer = make_trainer(tmp_path / "run", model, data=bad, strategy=strategy)
        kept[strategy.rank].append(weights_of(model))
        try:
            quiet(trainer)
        finally:
            kept[strategy.rank].append(weights_of(model))

    first, second = on_ranks(work)
    assert isinstance(first, NonFiniteError)
    assert isinstance(second, NonFiniteError)
    assert "iteration 0" in str(first)
    for before, after in kept.values():
        assert differences(before, after) == []


class StopAt(HookBase):
    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def after_epoch(self) -> None:
        self.trainer.should_stop = self.trainer.epoch == self.epoch


def test_a_rank_that_wants_to_stop_stops_all(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> int:
        hooks = [StopAt(1 if strategy.rank == 1 else None)]
        trainer = make_trainer(tmp_path, double_net(), data=doubles(), max_epochs=9, strategy=strategy, hooks=hooks)
        quiet(trainer)
        return trainer.progress.epoch

    assert on_ranks(work) == [2, 2]


class SignalAt(HookBase):
    """A signal as its handler notes it; in a thread no real one comes."""

    def __init__(self, iteration: int | None) -> None:
        self.iteration = iteration

    def after_iter(self) -> None:
        if self.trainer.cur_iter == self.iteration:
            self.trainer.stop_signals.received = signal.SIGTERM  # type: ignore[attr-defined]
            self.trainer._saver.wake()  # type: ignore[attr-defined]


def test_a_signal_on_one_rank_ends_all_of_them_after_one_save(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> None:
        hooks = [SignalAt(3 if strategy.rank == 1 else None)]
        data = doubles()
        quiet(
            make_trainer(tmp_path / "run", double_net(), data=data, strategy=strategy, hooks=hooks, create_new_dir=None)
        )

    results = on_ranks(work)
    assert [(type(result), getattr(result, "code", None)) for result in results] == [(SystemExit, 143)] * 2
    state = torch.load(tmp_path / "run" / "checkpoints" / "latest.pth", weights_only=True)
    assert state["progress"]["iter"] == 4
    assert len(state["rng"]) == 2


# ---------------------------------------------------------------- files


def test_rank_0_alone_writes_what_its_hooks_ask_for(tmp_path: Path) -> None:
    """As scripts for 1.7 have it: hooks on rank 0, none elsewhere."""

    def work(strategy: ThreadStrategy) -> str:
        hooks = [CheckpointerHook(max_to_keep=1), LoggerHook(progress_bar=False)] if strategy.rank == 0 else []
        folder = tmp_path / f"rank_{strategy.rank}"
        quiet(make_trainer(folder, double_net(), data=doubles(), strategy=strategy, hooks=hooks))
        return str(folder)

    first, second = on_ranks(work)
    assert {"latest.pth", "best.pth", "epoch_1.pth"} <= set(os.listdir(os.path.join(str(first), "checkpoints")))
    assert os.path.getsize(os.path.join(str(first), "metrics.jsonl")) > 0
    assert not [name for _, _, names in os.walk(str(second)) for name in names]


def test_hooks_on_all_ranks_write_once(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> None:
        hooks = [CheckpointerHook(), LoggerHook(progress_bar=False)]
        folder = tmp_path / f"rank_{strategy.rank}"
        quiet(make_trainer(folder, double_net(), data=doubles(), strategy=strategy, hooks=hooks))

    assert on_ranks(work) == [None, None]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files
    assert all(name.startswith("rank_0") for name in files)


def test_a_state_of_two_ranks_is_resumed_on_two(tmp_path: Path) -> None:
    whole = doubles()

    def run(epochs: int, resume: bool) -> list[Any]:
        def work(strategy: ThreadStrategy) -> dict[str, Tensor]:
            model = double_net()
            optimizer = AdamW(model.parameters(), lr=0.01)
            trainer = make_trainer(
                tmp_path / "run",
                model,
                optimizer,
                None,
                part(whole, strategy.rank),
                epochs,
                strategy=strategy,
                hooks=[CheckpointerHook()],
                create_new_dir=None,
                resume=tmp_path / "run" / "checkpoints" / "latest.pth" if resume else None,
            )
            quiet(trainer)
            return {**weights_of(model), "updates": torch.tensor(trainer.progress.num_updates)}

        return [weights(result) for result in on_ranks(work)]

    expected = run(4, resume=False)
    run(2, resume=False)
    assert differences(run(4, resume=True), expected) == []


# ---------------------------------------------------------------- evaluation


class MeanOfX:
    """A metric of this project's protocol."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, x: Tensor) -> None:
        self.sum, self.count = self.sum + float(x.sum()), self.count + x.numel()

    def merge(self, other: MeanOfX) -> None:
        self.sum, self.count = self.sum + other.sum, self.count + other.count

    def compute(self) -> dict[str, float]:
        return {"mean": self.sum / self.count, "count": self.count}

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum, self.count = state["sum"], state["count"]


class OldMetric:
    """A metric of 1.7, which cannot be merged."""

    def update(self, model: Any, batch: Any) -> None: ...

    def evaluate(self) -> dict[str, float]:
        return {"one": 1.0}


def evaluations(batches: list[Batch], hook: Callable[[list[Batch]], EvalHook | EvalTotalHook], **settings: Any) -> Any:
    trainer = make_trainer(settings.pop("work_dir"), double_net(), hooks=[hook(batches)], **settings)
    return trainer.evaluate()


def scores(batches: list[Batch]) -> EvalHook:
    def errors(model: Any, batch: Batch) -> dict[str, Tensor]:
        return {"error": (model.predict(batch[0]) - batch[1]).square().flatten(), "x": batch[0][:, 0]}

    return EvalHook(batches, errors, progress_bar=False, own_shards=True)


def means(batches: list[Batch]) -> EvalTotalHook:
    return EvalTotalHook(batches, MeanOfX(), inputs=lambda model, batch: batch[0], progress_bar=False, own_shards=True)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("hook", [scores, means])
def test_an_evaluation_counts_every_sample_of_all_ranks_once(
    hook: Any, uneven: bool, world_size: int, tmp_path: Path
) -> None:
    assert isinstance(MeanOfX(), Metric)
    whole = doubles(4, 7)
    expected = evaluations(whole, hook, work_dir=tmp_path / "one")

    def work(strategy: ThreadStrategy) -> Any:
        own = part(whole, strategy.rank, world_size, uneven=uneven)
        return evaluations(own, hook, work_dir=tmp_path / "run", strategy=strategy)

    results = on_ranks(work, world_size)
    assert all(result == results[0] for result in results), "the same bits on all ranks"
    assert results[0] == pytest.approx(expected, rel=1e-6)


def test_a_rank_without_a_sample_takes_part_in_an_evaluation(tmp_path: Path) -> None:
    whole = doubles(1, 7)
    expected = evaluations(whole, scores, work_dir=tmp_path / "one")

    def work(strategy: ThreadStrategy) -> Any:
        return evaluations(whole if strategy.rank == 0 else [], scores, work_dir=tmp_path / "run", strategy=strategy)

    assert on_ranks(work) == [expected, expected]


def test_a_metric_that_cannot_be_merged_is_told_before_the_first_step(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> Any:
        hook = EvalTotalHook(make_batches(1), OldMetric(), progress_bar=False)
        trainer = make_trainer(tmp_path / "run", double_net(), data=doubles(), strategy=strategy, hooks=[hook])
        try:
            quiet(trainer)
        finally:
            assert trainer.progress.iter == 0

    for result in on_ranks(work):
        with pytest.raises(ValueError, match=r"OldMetric .* 2 parts .* hooks=\[\]"):
            raise result


def test_a_metric_that_cannot_be_merged_is_told(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> Any:
        hook = EvalTotalHook(make_batches(1), OldMetric(), progress_bar=False)
        return make_trainer(tmp_path / "run", double_net(), strategy=strategy, hooks=[hook]).evaluate()

    for result in on_ranks(work):
        with pytest.raises(ValueError, match=r"OldMetric .* 2 parts"):
            raise result


# ---------------------------------------------------------------- one process


def test_one_process_answers_the_obvious_and_is_a_strategy() -> None:
    strategy = SingleProcess()
    assert isinstance(strategy, Strategy)
    model = nn.Linear(2, 1)
    assert strategy.prepare(model) is model
    wrapped = nn.Linear(2, 1)
    assert strategy.unwrap(nn.DataParallel(wrapped)) is wrapped  # which it moves to a GPU, if there is one
    loss = model(torch.ones(1, 2)).sum()
    strategy.backward(loss, inputs=[model.bias])
    assert model.weight.grad is None
    assert model.bias.grad is not None


class Counted(SingleProcess):
    """Counts the calls of each method."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        for name in [
            name for name in vars(SingleProcess) if callable(getattr(self, name)) and not name.startswith("_")
        ]:
            setattr(self, name, functools.partial(self._counted, name, getattr(self, name)))

    def _counted(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        return method(*args, **kwargs)


def test_a_run_asks_its_strategy_for_everything_that_depends_on_it(tmp_path: Path) -> None:
    strategy = Counted()
    hooks = [scores(make_batches(2, seed=2)), CheckpointerHook()]
    settings = {"clip_grad_norm": 1.0, "gradient_accumulation_steps": 2, "precision": "bf16"}
    trainer = make_trainer(tmp_path, data=make_batches(4), max_epochs=1, hooks=hooks, strategy=strategy, **settings)
    quiet(trainer)
    trainer.load_checkpoint("latest.pth")
    calls = strategy.calls
    assert calls["prepare"] == 1
    assert (calls["backward"], calls["accumulating"], calls["autocast"]) == (4, 2, 4)
    assert (calls["step"], calls["reduce_gradients"], calls["clip_grad_norm"]) == (2, 2, 2)
    assert calls["load_model_state"] == calls["load_optimizer_state"] == 1
    assert calls["model_state"] >= 1
    assert calls["optimizer_state"] >= 1
    assert calls["gather"] >= 1
    assert calls["collect"] >= 1
    assert calls["broadcast"] >= 1


@pytest.mark.parametrize("given", ["fsdp9", object(), SingleProcess, 3], ids=["name", "object", "class", "number"])
def test_what_is_no_strategy_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="strategy is"):
        make_trainer(tmp_path, strategy=given)


def test_the_distributed_room_can_be_imported_alone() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('torch_frame'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['torch_frame'] = package\n"
        "import torch_frame.distributed.strategy, torch_frame.distributed.comm\n"
        "print(sorted(name for name in sys.modules if name.startswith('torch_frame.')))"
    )
    folder = str(Path(sys.modules["torch_frame"].__file__ or "").parent)
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(
        ["torch_frame.distributed", "torch_frame.distributed.comm", "torch_frame.distributed.strategy"]
    )


class ManyRanks(Counted):
    """One of many ranks, whose others always say the same: who sends what, and how often."""

    def __init__(self, rank: int, world_size: int, told: list[Any]) -> None:
        self.rank, self.world_size = rank, world_size
        self.told = told  # what rank 0 has broadcast
        super().__init__()
        for name in ("gather", "sum", "collect", "broadcast"):
            setattr(self, name, functools.partial(self._counted, name, getattr(ManyRanks, name).__get__(self)))

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum(self, value: Any) -> Any:
        return value * self.world_size

    def collect(self, value: Any) -> list[Any]:
        return [value] * self.world_size if self.rank == 0 else []

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.told.append(copied(value))
            return value
        return self.told.pop(0)


@pytest.mark.parametrize("world_size", [8, 64])
def test_a_step_talks_to_many_ranks_as_often_as_to_two_and_rank_0_alone_writes(world_size: int, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.ones(1000, 3), torch.ones(1000, 1)), 2)

    def calls(rank: int, ranks: int, told: list[Any]) -> tuple[Counter[str], int, bool]:
        """Exchanges of an epoch, without those in its steps, whose number depends on the time they take."""
        strategy = ManyRanks(rank, ranks, told)
        folder = tmp_path / f"{rank}_{ranks}"
        trainer = make_trainer(folder, data=loader, max_epochs=1, hooks=[CheckpointerHook()], strategy=strategy)
        quiet(trainer)
        assert 1 <= strategy.calls["sum"] <= trainer.progress.iter
        together = {name: strategy.calls[name] for name in ("agree", "gather", "collect", "broadcast")}
        together["agree"] -= trainer.progress.iter  # by the update: these ranks exchange no gradients
        return Counter(together), trainer.progress.iter, (folder / "checkpoints" / "latest.pth").exists()

    told: list[Any] = []
    first, steps, wrote = calls(0, world_size, told)
    last, steps_of_last, wrote_last = calls(world_size - 1, world_size, told)
    assert told == []
    assert steps == steps_of_last == -(-1000 // (2 * world_size))
    assert first == last, "the same exchanges on all ranks"
    assert (wrote, wrote_last) == (True, False)
    assert first == calls(0, 2, told)[0]
    assert sum(first.values()) < 24


class Counters(HookBase):
    """What hooks see of an epoch; the run fails after an iteration."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.fails_after = fails_after
        self.seen: list[tuple[int, bool]] = []
        self.begun: list[int] = []

    def before_epoch(self) -> None:
        self.begun.append(self.trainer.epoch)

    def after_iter(self) -> None:
        if self.trainer.epoch == 0:
            self.seen.append((self.trainer.inner_iter, self.is_last_inner_iter()))
        if self.trainer.progress.iter == self.fails_after:
            raise UserError


@pytest.mark.parametrize(
    ("world_size", "batch_size", "first", "given"),
    [
        (2, 2, 3, False),  # nothing has changed
        (1, 4, 3, False),  # nor has the size of a global batch
        (1, 2, 6, False),
        (4, 2, 1, False),  # 28 samples are left, in 4 of 5 batches
        (1, 20, 0, False),  # as many batches follow as a whole epoch has
        (2, 2, 3, True),  # a batch sampler's, of which each rank is given one
        (1, 2, 6, True),
        (4, 2, 1, True),
    ],
)
def test_an_epoch_that_is_continued_on_other_ranks_counts_in_their_batches(
    world_size: int, batch_size: int, first: int, given: bool, tmp_path: Path
) -> None:
    """40 samples. Two ranks with batches of 2 have trained 3 of 10 global batches."""
    data = TensorDataset(torch.arange(40.0, dtype=torch.float64).reshape(40, 1))

    def run(world_size: int, size: int, hooks: list[Any], **settings: Any) -> Trainer:
        batches = [list(range(begin, begin + size)) for begin in range(0, 40, size)]
        loader = DataLoader(data, batch_sampler=batches) if given else DataLoader(data, size)
        trainer = make_trainer(
            tmp_path / "run",
            nn.Linear(1, 1).double(),
            data=loader,
            strategy=ManyRanks(0, world_size, []),
            create_new_dir=None,
            hooks=hooks,
            step_fn=lambda model, batch: model(batch[0]).square().mean() * 1e-4,
            **settings,
        )
        quiet(trainer)
        return trainer

    with pytest.raises(UserError):
        run(2, 2, [CheckpointerHook(every_n_iters=3), Counters(fails_after=5)])
    counters = Counters()
    trainer = run(world_size, batch_size, [counters], resume="auto", gradient_accumulation_steps=2)
    num_batches, num_left = -(-40 // (batch_size * world_size)), -(-28 // (batch_size * world_size))
    assert first + num_left == num_batches
    assert counters.seen == [(index, index + 1 == num_batches) for index in range(first, num_batches)]
    assert counters.begun == [1], "that of the first epoch was before the interruption"
    assert trainer.progress.num_updates == 3 + -(-num_left // 2) + -(-num_batches // 2)


# ---------------------------------------------------------------- what every rank must have in common


def test_ranks_with_seeds_of_their_own_train_on_every_sample_once(tmp_path: Path) -> None:
    """People seed each rank with seed + rank; the order of the data is rank 0's."""
    data = TensorDataset(torch.arange(12.0).reshape(12, 1))

    def seen(strategy: ThreadStrategy) -> list[float]:
        values: list[float] = []

        def step(model: nn.Module, batch: Any) -> Tensor:
            values.extend(batch[0].flatten().tolist())
            return model(batch[0]).square().mean()

        model = nn.Linear(1, 1)
        strategy.own_shards = False
        loader = DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(strategy.rank))
        quiet(
            make_trainer(
                tmp_path, model, SGD(model.parameters(), 0.1), None, loader, 1, strategy=strategy, step_fn=step
            )
        )
        return values

    first, second = on_ranks(seen)
    assert sorted([*first, *second]) == list(map(float, range(12)))  # type: ignore[misc]


def test_an_epoch_is_as_long_as_this_ranks_part(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.ones(22, 3), torch.ones(22, 1)), batch_size=3)

    def length(strategy: ThreadStrategy) -> int | None:
        strategy.own_shards = False
        return make_trainer(tmp_path, double_net(), data=loader, strategy=strategy).max_iters

    lengths = on_ranks(length)
    assert lengths == [2 * 4] * 2


class Falling(HookBase):
    """Logs a score that gets better by so much each epoch."""

    def __init__(self, gain: float) -> None:
        self.gain = gain

    def after_epoch(self) -> None:
        self.log(self.trainer.epoch, score=9 - self.gain * self.trainer.epoch, smooth=False, window_size=1)


@pytest.mark.parametrize("gains", [(0.0, 1.0), (1.0, 0.0)])
def test_the_plateau_steps_alike_on_all_ranks(gains: tuple[float, float], tmp_path: Path) -> None:
    def lr(strategy: ThreadStrategy) -> float:
        model = double_net()
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        settings = {"lr_scheduler_metric": "score", "strategy": strategy, "hooks": [Falling(gains[strategy.rank])]}
        trainer = make_trainer(tmp_path, model, optimizer, scheduler, doubles(), 4, **settings)
        quiet(trainer)
        return trainer.lr

    assert on_ranks(lr) == [0.1 if gains[0] else 0.1 * 0.5**3] * 2, "as rank 0's score has it"


def test_a_stop_that_another_rank_wants_leaves_a_state_and_one_folder(tmp_path: Path) -> None:
    def work(strategy: ThreadStrategy) -> str:
        hooks: list[HookBase] = [CheckpointerHook(period=5)]
        hooks += [StopAt(1 if strategy.rank == 1 else None)]
        trainer = make_trainer(
            tmp_path / "run", double_net(), data=doubles(), max_epochs=9, strategy=strategy, hooks=hooks
        )
        quiet(trainer)
        return trainer.ckpt_dir

    (tmp_path / "run").mkdir()
    first, second = on_ranks(work)
    assert first == second
    state = torch.load(Path(str(first)) / "latest.pth", weights_only=True)
    assert state["progress"]["epoch"] == 2
    assert len(list(tmp_path.iterdir())) == 2


class Halved(SingleProcess):
    """Holds half of each weight, and gives the whole when it is asked."""

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return {name: torch.cat([value, value]) for name, value in super().model_state(model).items()}


def test_weights_alone_are_whole_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, nn.Linear(2, 2), strategy=Halved())
    trainer.save_checkpoint("best.pth")
    saved = torch.load(Path(trainer.ckpt_dir) / "best.pth", weights_only=True)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {"weight": (4, 2), "bias": (4,)}
