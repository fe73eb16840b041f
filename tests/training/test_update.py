"""The gradient is that of the whole batch, at every precision; what is not finite never reaches the weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, SparseAdam
from torch.optim.lr_scheduler import ExponentialLR, LinearLR
from torch.utils.data import DataLoader, IterableDataset

from tests.small_hooks import On
from tests.small_runs import Net, copied, differences, make_batches, make_trainer, raised_by, weights_of
from torch_frame import CheckpointerHook, NonFiniteError, Trainer

Batch = Any
SGD_MOMENTUM = lambda parameters: SGD(parameters, lr=0.05, momentum=0.9)  # noqa: E731


def doubled(batches: list[Batch]) -> list[Batch]:
    return [tuple(part.double() for part in batch) for batch in batches]


def joined(batches: list[Batch]) -> Batch:
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def assert_close(expected: nn.Module, model: nn.Module) -> None:
    """Equal to 1e-12, in fp64."""
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def step_by_hand(model: nn.Module, optimizer: Any, batch: Batch) -> None:
    model.train()
    optimizer.zero_grad()
    model(batch).backward()
    optimizer.step()


# ---------------------------------------------------------------- windows


class Sized:
    """Batches from an object that claims a length: the true one, another one, or none."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class ClaimsMore(Sized):
    def __len__(self) -> int:
        return len(self.batches) + 4


class ClaimsFewer(Sized):
    def __len__(self) -> int:
        return len(self.batches) - 2


class Stream(IterableDataset[Any]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


LOADERS: dict[str, Callable[[list[Batch]], Any]] = {
    "list": list,
    "no_length": Sized,
    "iterable_dataset": lambda batches: DataLoader(Stream(batches), batch_size=None),
    "claims_more": ClaimsMore,
    "claims_fewer": ClaimsFewer,
}


@pytest.mark.parametrize("num_batches", [1, 4, 5, 7, 8])
@pytest.mark.parametrize("loader", LOADERS)
def test_each_update_is_the_mean_over_the_batches_its_window_really_holds(
    loader: str, num_batches: int, tmp_path: Path
) -> None:
    if loader == "claims_fewer" and num_batches < 3:
        pytest.skip("a length of 0 is an empty loader")
    batches = doubled(make_batches(num_batches))
    model, expected = Net().double(), Net().double()
    ends: list[int] = []
    trainer = make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=LOADERS[loader](batches),
        gradient_accumulation_steps=4,
        hooks=[On(after_update=lambda trainer: ends.append(trainer.cur_iter + 1))],
    )
    trainer.train()

    optimizer = SGD_MOMENTUM(expected.parameters())
    for begin, end in itertools.pairwise([0, *ends]):
        step_by_hand(expected, optimizer, joined([batches[i % num_batches] for i in range(begin, end)]))
    assert_close(expected, model)
    assert trainer.progress.num_updates == len(ends)
    assert num_batches in ends, "a window ends with its epoch"
    if loader != "claims_fewer":
        of_an_epoch = [*range(4, num_batches, 4), num_batches]
        assert ends == of_an_epoch + [num_batches + end for end in of_an_epoch]


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_full_windows_have_the_bits_of_a_loop_that_divides_the_loss(steps: int, clip: float, tmp_path: Path) -> None:
    batches = make_batches(8)
    model, expected = Net(norm=True), Net(norm=True)
    optimizer = SGD_MOMENTUM(expected.parameters())
    for _ in range(2):
        for i, batch in enumerate(batches):
            (expected(batch) / steps).backward()
            if (i + 1) % steps == 0:
                if clip:
                    nn.utils.clip_grad_norm_(expected.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=batches,
        gradient_accumulation_steps=steps,
        clip_grad_norm=clip,
    ).train()
    assert differences(weights_of(expected), weights_of(model)) == []


@pytest.mark.parametrize("settings", [{}, {"loss_weight": lambda batch: len(batch[0])}], ids=["plain", "loss_weight"])
def test_a_window_of_one_batch_has_the_bits_of_the_plain_loop(settings: dict[str, Any], tmp_path: Path) -> None:
    batches = make_batches(5, last=1)
    model, expected = Net(), Net()
    optimizer = AdamW(expected.parameters(), lr=0.01)
    for batch in batches * 2:
        step_by_hand(expected, optimizer, batch)
    make_trainer(tmp_path, model, AdamW(model.parameters(), lr=0.01), data=batches, **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []


def test_scheduler_and_num_updates_count_windows(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        ExponentialLR(optimizer, 0.5),
        make_batches(5),
        lr_scheduler_interval="iter",
        gradient_accumulation_steps=4,
    )
    trainer.train()
    assert used == [1e-3 * 0.5**n for n in range(4)]
    assert trainer.progress.num_updates == 4


def test_each_batch_of_a_window_is_recorded_with_the_rate_that_its_update_used(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=1e-3)
    recorded: list[float] = []
    make_trainer(
        tmp_path,
        model,
        optimizer,
        ExponentialLR(optimizer, 0.5),
        make_batches(4),
        gradient_accumulation_steps=2,
        hooks=[On(after_iter=lambda trainer: recorded.append(trainer.metric_storage["lr"].latest))],
    ).train()
    assert recorded == [1e-3] * 4 + [0.5e-3] * 4


# ---------------------------------------------------------------- loss_weight

SPLITS = {
    "16": [16],
    "8x2": [8, 8],
    "4x4": [4, 4, 4, 4],
    "1x16": [1] * 16,
    "ragged": [5, 1, 7, 3],
    "first_is_small": [1, 15],
    "first_is_large": [13, 2, 1],
}


class TokenNet(nn.Module):
    """The loss is a mean over the tokens that count, as in language models: batch = (x (N, T, 3), mask (N, T))."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)

    def forward(self, batch: Batch) -> Tensor:
        x, mask = batch
        return (self.layer(x).squeeze(-1).square() * mask).sum() / mask.sum()


WEIGHTS: dict[str, tuple[type[nn.Module], Callable[[Batch], Any]]] = {
    "items": (Net, lambda batch: len(batch[0])),
    "items_as_float": (Net, lambda batch: float(len(batch[0]))),
    "items_as_fractions": (Net, lambda batch: len(batch[0]) / 1000),
    "items_as_whole_tensor": (Net, lambda batch: torch.tensor(len(batch[0]))),
    "items_as_tensor_of_one": (Net, lambda batch: torch.tensor([float(len(batch[0]))])),
    "items_with_a_graph": (Net, lambda batch: torch.tensor(float(len(batch[0])), requires_grad=True) * 1),
    "tokens": (TokenNet, lambda batch: batch[1].sum()),
    "tokens_as_number": (TokenNet, lambda batch: int(batch[1].sum())),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weighted_batches_are_the_large_batch_however_it_is_split(
    weight: Any, split: list[int], tmp_path: Path
) -> None:
    make_model, loss_weight = weight
    generator = torch.Generator().manual_seed(3)
    if make_model is Net:
        whole = doubled(make_batches(1, 16))[0]
    else:
        mask = torch.rand(16, 6, generator=generator) < 0.5
        mask[:, 0] = True
        whole = (torch.randn(16, 6, 3, generator=generator).double(), mask)
    batches = list(zip(*(part.split(split) for part in whole), strict=True))
    model, expected = make_model().double(), make_model().double()
    optimizer = SGD_MOMENTUM(expected.parameters())
    for _ in range(3):
        step_by_hand(expected, optimizer, whole)
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=batches,
        max_epochs=3,
        gradient_accumulation_steps=max(len(split), 2),
        loss_weight=loss_weight,
    ).train()
    assert_close(expected, model)


@pytest.mark.parametrize("loader", ["list", "no_length", "claims_more"])
def test_a_ragged_last_window_is_weighted_too(loader: str, tmp_path: Path) -> None:
    batches = doubled([make_batches(1, size, seed=size)[0] for size in (5, 1, 7, 3, 2)])
    model, expected = Net().double(), Net().double()
    optimizer = SGD_MOMENTUM(expected.parameters())
    for window in [batches[:3], batches[3:]] * 2:
        step_by_hand(expected, optimizer, joined(window))
    make_trainer(
        tmp_path,
        model,
        SGD_MOMENTUM(model.parameters()),
        data=LOADERS[loader](batches),
        gradient_accumulation_steps=3,
        loss_weight=lambda batch: len(batch[0]),
    ).train()
    assert_close(expected, model)


BAD_WEIGHTS = {
    "zero": 0,
    "negative": -1.0,
    "nan": float("nan"),
    "infinite": float("inf"),
    "none": None,
    "text": "8",
    "vector": torch.ones(4),
    "zero_tensor": torch.tensor(0),
    "negative_tensor": torch.tensor(-1.0),
    "nan_tensor": torch.tensor(float("nan")),
    "infinite_tensor": torch.tensor(float("inf")),
}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("weight", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_weight_that_is_no_positive_number_is_told(weight: Any, steps: int, at: int, tmp_path: Path) -> None:
    weights = iter([weight] if at == 0 else [4, weight])
    model = Net()
    before = weights_of(model)
    trainer = make_trainer(tmp_path, model, gradient_accumulation_steps=steps, loss_weight=lambda batch: next(weights))
    error = raised_by(trainer.train, Exception)
    assert isinstance(error, ValueError | TypeError)
    assert "loss_weight" in str(error)
    if at < steps:
        assert differences(before, weights_of(model)) == []


# ---------------------------------------------------------------- fp16 and bf16


class LoudNet(Net):
    """So large a loss that the first fp16 scales overflow."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * 300


def fp16_by_hand(
    model: nn.Module, optimizer: Any, batches: list[Batch], clip: float, steps: int, scheduler: Any = None
) -> list[float]:
    """The recipe of torch's AMP examples; returns the scale after each update."""
    scaler = torch.amp.GradScaler("cpu")
    scales = []
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch) / steps
        scaler.scale(loss).backward()
        if (i + 1) % steps == 0:
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
    return scales


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd_momentum": SGD_MOMENTUM,
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw_fused": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("model_type", [Net, LoudNet])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fp16_has_the_bits_and_scales_of_a_loop_with_its_own_scaler(
    optimizer: str, clip: float, steps: int, model_type: Any, tmp_path: Path
) -> None:
    batches = make_batches(8)
    model, expected = model_type(), model_type()
    by_hand = fp16_by_hand(expected, OPTIMIZERS[optimizer](expected.parameters()), batches * 2, clip, steps)
    scales: list[float] = []
    trainer = make_trainer(
        tmp_path,
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        data=batches,
        precision="fp16",
        clip_grad_norm=clip,
        gradient_accumulation_steps=steps,
        hooks=[On(after_update=lambda trainer: scales.append(trainer.precision.scaler.get_scale()))],
    )
    trainer.train()
    assert scales == by_hand
    assert differences(weights_of(expected), weights_of(model)) == []
    overflows = sum(after < before for before, after in itertools.pairwise([65536.0, *by_hand]))
    assert trainer.updater.num_skipped == overflows
    assert overflows > 0 or model_type is Net


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_bf16_has_the_bits_of_an_autocast_loop(clip: float, steps: int, tmp_path: Path) -> None:
    batches = make_batches(8)
    model, expected, in_fp32 = Net(norm=True), Net(norm=True), Net(norm=True)
    optimizer = SGD_MOMENTUM(expected.parameters())
    for i, batch in enumerate(batches * 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = expected(batch) / steps
        loss.backward()
        if (i + 1) % steps == 0:
            if clip:
                nn.utils.clip_grad_norm_(expected.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    settings = {"data": batches, "clip_grad_norm": clip, "gradient_accumulation_steps": steps}
    make_trainer(tmp_path, model, SGD_MOMENTUM(model.parameters()), precision="bf16", **settings).train()
    make_trainer(tmp_path, in_fp32, SGD_MOMENTUM(in_fp32.parameters()), **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert differences(weights_of(in_fp32), weights_of(model))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_recorded_norm_is_that_of_the_true_gradient_before_clipping(precision: Any, tmp_path: Path) -> None:
    batch = make_batches(1)[0]
    model, expected = Net(), Net()
    expected(batch).backward()
    norm = nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    trainer = make_trainer(tmp_path, model, data=[batch], max_epochs=1, clip_grad_norm=1e-3, precision=precision)
    trainer.train()
    assert trainer.metric_storage["grad_norm"].latest == pytest.approx(
        norm.item(), rel=1e-6 if precision == "fp32" else 0.05
    )


class NormLoudNet(LoudNet):
    def __init__(self) -> None:
        super().__init__(norm=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_overflow_in_fp16_leaves_weights_buffers_and_state(steps: int, tmp_path: Path) -> None:
    model = NormLoudNet()
    optimizer = AdamW(model.parameters(), lr=0.01)
    seen: list[Any] = []

    def look(trainer: Trainer) -> None:
        if not trainer.updater.window_open:
            seen.append((trainer.updater.num_skipped, weights_of(model), copied(optimizer.state_dict()["state"])))

    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        data=make_batches(16),
        precision="fp16",
        gradient_accumulation_steps=steps,
        hooks=[On(before_train=look, after_iter=look)],
    )
    trainer.train()
    assert 0 < trainer.updater.num_skipped < 32 // steps
    for (num_before, *before), (num_after, *after) in itertools.pairwise(seen):
        assert (differences(before, after) == []) == (num_after > num_before)


@pytest.mark.parametrize("scale_loss", [float("inf"), float("nan")])
def test_fp16_without_a_finite_gradient_raises_in_the_end(scale_loss: float, tmp_path: Path) -> None:
    model = Net(norm=True)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        model,
        data=make_batches(200, 2),
        precision="fp16",
        step_fn=lambda model, batch: {"mse": model(batch) * scale_loss},
    )
    error = raised_by(trainer.train, NonFiniteError)
    for text in ("in a row", "epoch 0", f"iteration {trainer.cur_iter}", "mse="):
        assert text in str(error)
    assert 10 <= trainer.updater.num_skipped <= 100
    assert differences(before, weights_of(model)) == []


def test_fp16_that_may_skip_goes_on(tmp_path: Path) -> None:
    model = Net(norm=True)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path,
        model,
        data=make_batches(200, 2),
        max_epochs=1,
        precision="fp16",
        on_nonfinite="skip",
        step_fn=lambda model, batch: model(batch) * float("nan"),
    )
    trainer.train()
    assert trainer.updater.num_skipped == 200
    assert differences(before, weights_of(model)) == []


def test_a_resumed_fp16_run_is_bitwise_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """Its scale has come down by then: the first update after the resume is not to be taken for an overflow."""

    def trainer(name: str, epochs: int) -> Trainer:
        model = NormLoudNet()
        optimizer = SGD(model.parameters(), lr=1e-4)
        return make_trainer(
            tmp_path / name,
            model,
            optimizer,
            data=make_batches(12),
            max_epochs=epochs,
            precision="fp16",
            hooks=[CheckpointerHook()],
            create_new_dir=None,
        )

    whole = trainer("whole", 2)
    whole.train()
    trainer("parts", 1).train()
    resumed = trainer("parts", 2)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert whole.precision.scaler.get_scale() < 65536
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []


def test_a_skipped_first_step_needs_no_warning_of_the_schedulers(tmp_path: Path) -> None:
    model = LoudNet()
    optimizer = SGD(model.parameters(), lr=0.01)
    scheduler = ExponentialLR(optimizer, 0.9)
    make_trainer(
        tmp_path, model, optimizer, scheduler, make_batches(8), 1, precision="fp16", lr_scheduler_interval="iter"
    ).train()


# ---------------------------------------------------------------- not finite: raise


def poisoned(num: int, at: set[int], kind: str) -> list[Batch]:
    """Batches of which some make the loss or only the gradient non-finite."""
    return [(*batch, kind if i in at else "good") for i, batch in enumerate(make_batches(num))]


def poisoned_step(model: Any, batch: Batch) -> Any:
    x, y, kind = batch
    if kind == "nan_input":
        x = x * float("nan")
    losses = {"mse": model((x, y))}
    if kind == "nan_loss":
        losses["extra"] = losses["mse"] * float("nan")
    elif kind == "inf_loss":
        losses["extra"] = losses["mse"] * float("inf")
    elif kind == "nan_number":
        losses["extra"] = float("nan")
    elif kind == "nan_gradient":
        losses["extra"] = (model.layers[0].weight.sum() * 0).sqrt()  # 0, and its derivative is inf * 0
    elif kind == "inf_gradient":
        losses["extra"] = (model.layers[0].bias - model.layers[0].bias.detach()).sqrt().sum()
    return losses


KINDS = ["nan_input", "nan_loss", "inf_loss", "nan_number", "nan_gradient", "inf_gradient"]


@pytest.mark.parametrize("loader", ["list", "no_length"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("at", [0, 4, 6])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_raised_before_it_reaches_the_weights(
    kind: str, clip: float, at: int, steps: int, loader: str, tmp_path: Path
) -> None:
    """Seven batches: with windows of 3, one in the middle of a window, one in the last window of a single batch."""
    batches = poisoned(7, {at}, kind)
    model, expected = Net(norm=True), Net(norm=True)
    optimizer = AdamW(model.parameters(), lr=0.01)
    first_of_window = at - at % steps
    if first_of_window:
        make_trainer(
            tmp_path / "expected",
            expected,
            AdamW(expected.parameters(), lr=0.01),
            data=batches[:first_of_window],
            max_epochs=1,
            clip_grad_norm=clip,
            gradient_accumulation_steps=steps,
            step_fn=poisoned_step,
        ).train()
    trainer = make_trainer(
        tmp_path / "run",
        model,
        optimizer,
        data=LOADERS[loader](batches),
        clip_grad_norm=clip,
        gradient_accumulation_steps=steps,
        step_fn=poisoned_step,
    )
    message = str(raised_by(trainer.train, NonFiniteError))
    end = at if "gradient" not in kind or steps == 1 else min(first_of_window + steps - 1, 6)
    assert "epoch 0" in message
    assert f"iteration {end} " in message or f"iteration {end}:" in message
    assert "mse=" in message
    assert "extra=" in message or kind == "nan_input" or end != at
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(expected.named_parameters())[name])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_outside_the_model_is_looked_at_too(clip: float, tmp_path: Path) -> None:
    """A learnable loss weight, say, that the optimizer holds and the model doesn't."""
    model, outside = Net(), nn.Parameter(torch.zeros(()))
    optimizer = SGD([*model.parameters(), outside], lr=0.05)
    trainer = make_trainer(
        tmp_path, model, optimizer, clip_grad_norm=clip, step_fn=lambda model, batch: model(batch) + outside.sqrt()
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert outside.item() == 0.0


def test_a_metric_may_be_nan(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_fn=lambda model, batch: (model(batch), {"acc": float("nan")}))
    trainer.train()
    assert trainer.progress.num_updates == 10


# ---------------------------------------------------------------- not finite: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_weights_buffers_and_optimizer_state_bitwise(
    optimizer: str, clip: float, kind: str, tmp_path: Path
) -> None:
    bad = {0, 3, 4}
    batches = poisoned(6, bad, kind)
    model, expected = Net(norm=True), Net(norm=True)
    own, by_hand = (OPTIMIZERS[optimizer](net.parameters()) for net in (model, expected))
    states: list[Any] = [(weights_of(model), copied(own.state_dict()))]
    trainer = make_trainer(
        tmp_path,
        model,
        own,
        data=batches,
        clip_grad_norm=clip,
        on_nonfinite="skip",
        step_fn=poisoned_step,
        hooks=[On(after_iter=lambda trainer: states.append((weights_of(model), copied(own.state_dict()))))],
    )
    trainer.train()
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        assert (differences(before, after) == []) == (i % 6 in bad)
    assert trainer.updater.num_skipped == 2 * len(bad)

    for x, y, kind in batches * 2:
        if kind == "good":
            by_hand.zero_grad()
            expected((x, y)).backward()
            if clip:
                nn.utils.clip_grad_norm_(expected.parameters(), clip)
            by_hand.step()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert differences(by_hand.state_dict(), own.state_dict()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_a_bad_batch_leaves_out_its_window_and_nothing_else(at: int, kind: str, tmp_path: Path) -> None:
    batches = poisoned(5, {at}, kind)
    model, expected = Net(norm=True), Net(norm=True)
    trainer = make_trainer(
        tmp_path / "a",
        model,
        data=batches,
        max_epochs=1,
        gradient_accumulation_steps=2,
        on_nonfinite="skip",
        step_fn=poisoned_step,
    )
    trainer.train()
    window = at - at % 2
    make_trainer(
        tmp_path / "b",
        expected,
        data=batches[:window] + batches[window + 2 :],
        max_epochs=1,
        gradient_accumulation_steps=2,
        step_fn=poisoned_step,
    ).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert trainer.updater.num_skipped == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_step_moves_neither_schedule_nor_ema_nor_the_count_of_updates(precision: Any, tmp_path: Path) -> None:
    """The run goes on as one without that batch."""
    trainers = []
    for name, batches in (("with", poisoned(6, {2}, "nan_loss")), ("without", poisoned(5, set(), ""))):
        if name == "without":
            batches = [batch for i, batch in enumerate(poisoned(6, set(), "")) if i != 2]
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.01)
        scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=10)
        trainer = make_trainer(
            tmp_path / name,
            model,
            optimizer,
            scheduler,
            batches,
            lr_scheduler_interval="iter",
            use_ema=True,
            warmup_method="linear",
            warmup_iters=6,
            on_nonfinite="skip",
            precision=precision,
            step_fn=poisoned_step,
        )
        trainer.train()
        trainers.append(trainer)
    with_bad, without = trainers
    for trainer in trainers:
        assert trainer.progress.num_updates == trainer.progress.iter - trainer.updater.num_skipped
        assert trainer.model_ema.updates == trainer.progress.num_updates
        assert trainer.lr_scheduler.num_updates == trainer.progress.num_updates
    if precision == "fp32":  # in fp16 the scale that a run begins with is too high for some steps
        assert differences(weights_of(without.model), weights_of(with_bad.model)) == []
        assert differences(weights_of(without.model_evaluate), weights_of(with_bad.model_evaluate)) == []
        assert with_bad.progress.num_updates == without.progress.num_updates == 10
        assert with_bad.lr == without.lr
        assert with_bad.updater.num_skipped == 2
    assert with_bad.updater.num_skipped >= 2


def test_all_batches_bad_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = Net(norm=True)
    before = weights_of(model)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    trainer = make_trainer(
        tmp_path, model, optimizer, data=poisoned(3, {0, 1, 2}, "nan_input"), on_nonfinite="skip", step_fn=poisoned_step
    )
    trainer.train()
    assert differences(before, weights_of(model)) == []
    assert optimizer.state_dict()["state"] == {}
    assert trainer.updater.num_skipped == 6


class LastInput(Net):
    """Keeps its last input in a buffer, whose shape follows the batch's."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.register_buffer("last", torch.zeros(4, 3), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        self.last = batch[0]
        return super().forward(batch)


def test_putting_buffers_back_never_writes_into_the_users_data(tmp_path: Path) -> None:
    batches = poisoned(4, {1, 3}, "nan_loss")
    before = copied([batch[:2] for batch in batches])
    make_trainer(tmp_path, LastInput(), data=batches, on_nonfinite="skip", step_fn=poisoned_step).train()
    assert differences(before, [list(batch[:2]) for batch in batches]) == []


@pytest.mark.parametrize("settings", [{"on_nonfinite": "skip"}, {"precision": "fp16"}], ids=["skip", "fp16"])
def test_a_buffer_may_change_its_shape(settings: dict[str, Any], tmp_path: Path) -> None:
    model = LastInput()
    trainer = make_trainer(tmp_path, model, data=make_batches(3, last=2), **settings)
    trainer.train()
    assert trainer.progress.num_updates == 6


# ---------------------------------------------------------------- parameters of all kinds


class Words(nn.Module):
    """A sparse embedding: model((N, 2) words) -> loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(10, 4, sparse=True)

    def forward(self, words: Tensor) -> Tensor:
        loss = self.table(words).square().mean()
        return loss * float("nan") if (words == 9).any() else loss


SPARSE: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.5),
    "sparse_adam": lambda parameters: SparseAdam(parameters, lr=0.1),
}
SENTENCES = [torch.tensor(words) for words in ([[1, 2], [2, 2]], [[3, 1], [2, 4]], [[5, 5], [0, 1]])]


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}], ids=["raise", "skip"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("optimizer", SPARSE)
def test_sparse_gradients_train(optimizer: str, steps: int, settings: dict[str, Any], tmp_path: Path) -> None:
    model, expected = Words().double(), Words().double()
    by_hand = SPARSE[optimizer](list(expected.parameters()))
    for window in [SENTENCES[i : i + steps] for i in range(0, 3, steps)] * 2:
        step_by_hand(expected, by_hand, torch.cat(window))
    make_trainer(
        tmp_path,
        model,
        SPARSE[optimizer](list(model.parameters())),
        data=SENTENCES,
        gradient_accumulation_steps=steps,
        **settings,
    ).train()
    assert_close(expected, model)


@pytest.mark.parametrize("steps", [1, 2])
def test_sparse_gradients_that_are_not_finite_are_found(steps: int, tmp_path: Path) -> None:
    model = Words()
    before = weights_of(model)
    nan_gradient = lambda model, words: model(words) + (model.table(words).sum() * 0).sqrt()  # noqa: E731
    trainer = make_trainer(tmp_path, model, data=SENTENCES, gradient_accumulation_steps=steps, step_fn=nan_gradient)
    with pytest.raises(NonFiniteError, match="gradient"):
        trainer.train()
    assert differences(before, weights_of(model)) == []


def test_sparse_gradients_are_skipped_too(tmp_path: Path) -> None:
    model, expected = Words(), Words()
    by_hand = SparseAdam(list(expected.parameters()), lr=0.1)
    for words in SENTENCES:
        step_by_hand(expected, by_hand, words)
    data = [SENTENCES[0], torch.tensor([[9, 1]]), *SENTENCES[1:]]
    optimizer = SparseAdam(list(model.parameters()), lr=0.1)
    trainer = make_trainer(tmp_path, model, optimizer, data=data, max_epochs=1, on_nonfinite="skip")
    trainer.train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert trainer.updater.num_skipped == 1


class Odd(nn.Module):
    """A branch that is used every other time, a part that is never used, and two number formats."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(3, 4).double()
            self.branch = nn.Linear(4, 4)
            self.last = nn.Linear(4, 1)
            self.unused = nn.Linear(2, 2)

    def forward(self, batch: Batch) -> Tensor:
        x, y = batch
        hidden = self.first(x.double()).float()
        if x[0, 0] > 0:
            hidden = hidden + self.branch(hidden)
        return F.mse_loss(self.last(hidden), y)


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}], ids=["raise", "skip"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adamw"])
def test_unused_parameters_and_mixed_formats_have_the_bits_of_the_plain_loop(
    optimizer: str, clip: float, settings: dict[str, Any], tmp_path: Path
) -> None:
    batches = make_batches(6)
    model, expected = Odd(), Odd()
    by_hand = OPTIMIZERS[optimizer](expected.parameters())
    for batch in batches * 2:
        by_hand.zero_grad()
        expected(batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        by_hand.step()
    own = OPTIMIZERS[optimizer](model.parameters())
    make_trainer(tmp_path, model, own, data=batches, clip_grad_norm=clip, **settings).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    assert torch.equal(model.unused.weight, Odd().unused.weight)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("part", ["first", "last"])
def test_a_bad_gradient_is_found_in_each_number_format(part: str, clip: float, tmp_path: Path) -> None:
    model = Odd()
    before = weights_of(model)
    step = lambda model, batch: model(batch) + (getattr(model, part).weight.sum() * 0).sqrt()  # noqa: E731
    with pytest.raises(NonFiniteError):
        make_trainer(tmp_path, model, clip_grad_norm=clip, step_fn=step).train()
    assert differences(before, weights_of(model)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_number_format_trains(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = [tuple(part.to(dtype) for part in batch) for batch in make_batches(3)]
    model, expected = Net().to(dtype), Net().to(dtype)
    optimizer = SGD(expected.parameters(), lr=0.05)
    for batch in batches * 2:
        step_by_hand(expected, optimizer, batch)
    make_trainer(tmp_path, model, data=batches).train()
    assert differences(weights_of(expected), weights_of(model)) == []
    step = lambda model, batch: model(batch) + (model.layers[0].weight.sum() * 0).sqrt()  # noqa: E731
    trainer = make_trainer(tmp_path, model, data=batches, step_fn=step)
    with pytest.raises(NonFiniteError):
        trainer.train()


# ---------------------------------------------------------------- parameters that come later

MOMENTS = {"first_batch": 0, "mid_epoch": 2, "second_epoch": 7}


def unfreeze(model: Any, optimizer: Any) -> None:
    model.layers[0].requires_grad_(True)


def freeze(model: Any, optimizer: Any) -> None:
    model.layers[2].requires_grad_(False)


def add_group(model: Any, optimizer: Any) -> None:
    model.layers[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[0].parameters())})


CHANGES: dict[str, Callable[[Any, Any], None]] = {"unfrozen": unfreeze, "frozen": freeze, "group_added": add_group}


def changing(change: str, model: Any) -> Any:
    """The optimizer of a model that `change` fits."""
    if change != "frozen":
        model.layers[0].requires_grad_(False)
    if change == "group_added":
        return SGD(model.layers[2].parameters(), lr=0.05, momentum=0.9)
    return SGD_MOMENTUM(model.parameters())


@pytest.mark.parametrize("stage", ["before_iter", "before_update"])
@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize(("steps", "clip"), [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_hook_changes_in_mid_run_counts_from_then_on(
    change: str, steps: int, clip: float, moment: int, stage: str, tmp_path: Path
) -> None:
    """As in the plain loop with the same change at the same place; 5 batches, so windows of 2 are ragged."""
    if stage == "before_update":
        moment = {0: 1, 2: 3, 7: 8}[moment]  # batches that end a window, with 1 and with 2
    batches = doubled(make_batches(5))
    model, expected = Net().double(), Net().double()
    optimizer, by_hand = changing(change, model), changing(change, expected)

    def apply(at: str, i: int) -> None:
        if at == stage and i == moment:
            CHANGES[change](expected, by_hand)

    for epoch in range(2):
        for first in range(0, 5, steps):
            window = batches[first : first + steps]
            for k, batch in enumerate(window):
                i = epoch * 5 + first + k
                apply("before_iter", i)
                if k == 0:
                    by_hand.zero_grad()
                (expected(batch) / len(window)).backward()
                if k + 1 == len(window):
                    apply("before_update", i)
                    if clip:
                        nn.utils.clip_grad_norm_(expected.parameters(), clip)
                    by_hand.step()
                apply("after_iter", i)

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == moment:
            CHANGES[change](model, optimizer)

    make_trainer(
        tmp_path,
        model,
        optimizer,
        data=batches,
        gradient_accumulation_steps=steps,
        clip_grad_norm=clip,
        hooks=[On(**{stage: hook})],
    ).train()
    assert_close(expected, model)
    if change != "frozen":
        assert not torch.equal(model.layers[0].weight, Net().double().layers[0].weight)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("change", ["unfrozen", "group_added"])
def test_a_bad_gradient_of_a_parameter_that_came_later_is_found(change: str, clip: float, tmp_path: Path) -> None:
    model = Net()
    optimizer = changing(change, model)
    before = model.layers[0].weight.detach().clone()
    batches = poisoned(5, {3}, "nan_gradient")

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == 2:
            CHANGES[change](model, optimizer)
            before.copy_(model.layers[0].weight.detach())
        elif trainer.cur_iter == 3:
            before.copy_(model.layers[0].weight.detach())

    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        data=batches,
        clip_grad_norm=clip,
        step_fn=poisoned_step,
        hooks=[On(before_iter=hook)],
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert torch.equal(model.layers[0].weight, before)


def test_a_group_may_be_added_during_the_warm_up(tmp_path: Path) -> None:
    model = Net()
    optimizer = changing("group_added", model)
    used: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append([g["lr"] for g in optimizer.param_groups]))

    def hook(trainer: Trainer) -> None:
        if trainer.cur_iter == 1:
            model.layers[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model.layers[0].parameters()), "lr": 0.5})

    make_trainer(
        tmp_path,
        model,
        optimizer,
        max_epochs=1,
        warmup_method="constant",
        warmup_iters=4,
        warmup_factor=0.5,
        hooks=[On(after_iter=hook)],
    ).train()
    assert [lrs[0] for lrs in used] == [0.025] * 4 + [0.05]
    assert used[-1] == [0.05, 0.5]


# ---------------------------------------------------------------- checkpoints


def is_finite_file(path: str | Path) -> bool:
    state = torch.load(path, weights_only=True)
    return all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


@pytest.mark.parametrize("settings", [{}, {"use_ema": True}, {"precision": "fp16"}, {"on_nonfinite": "skip"}], ids=str)
def test_weights_that_an_update_made_infinite_are_not_written(settings: dict[str, Any], tmp_path: Path) -> None:
    """The gradient of the run's last batch is finite, but the step is far too large."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.01)

    def explode(trainer: Trainer) -> None:
        if trainer.cur_iter == 9:
            optimizer.param_groups[0]["lr"] = 3e38

    trainer = make_trainer(
        tmp_path,
        model,
        optimizer,
        step_fn=lambda model, batch: model(batch) * 10,
        hooks=[On(before_update=explode), CheckpointerHook()],
        **settings,
    )
    with pytest.raises(NonFiniteError, match="checkpoint"):
        trainer.train()
    assert is_finite_file(os.path.join(trainer.ckpt_dir, "latest.pth"))
    best = torch.load(os.path.join(trainer.ckpt_dir, "best.pth"), weights_only=True)
    assert all(value.isfinite().all() for value in best.values())


@pytest.mark.parametrize("kind", ["nan_input", "nan_gradient"])
def test_a_hook_that_saves_on_an_error_does_not_write_nan_over_a_good_checkpoint(kind: str, tmp_path: Path) -> None:
    """A NaN forward has left NaN in batch norm's buffers by then."""
    saver = On(on_exception=lambda trainer: trainer.save_checkpoint("latest.pth", save_single_model=False))
    model = Net(norm=True)
    trainer = make_trainer(
        tmp_path,
        model,
        data=poisoned(6, {5}, kind),
        max_epochs=1,
        hooks=[saver],
        step_fn=poisoned_step,
        create_new_dir=None,
    )
    trainer.save_checkpoint("latest.pth", save_single_model=False)
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert is_finite_file(os.path.join(trainer.ckpt_dir, "latest.pth"))
