"""A run that was saved in format 2 goes on bitwise; the files are real ones (golden_2/make.py)."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tests.checkpoint.golden_2.make import (
    BATCH_SIZE,
    EMA_DECAY,
    EMA_UPDATES,
    HELD_OUT,
    MAX_EPOCHS,
    PLACES,
    WARMUP_FACTOR,
    WARMUP_ITERS,
    Net,
    Samples,
    environment,
    finished,
    loss_of,
    make_optimizer,
    make_run,
    make_scheduler,
    squared_errors,
)
from tests.small_data import noise
from tests.small_runs import differences
from torch_frame.data.source import source_of

GOLDEN = Path(__file__).parent / "golden_2"


def golden(name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(GOLDEN / f"{name}.pth", weights_only=True)
    return content


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """The name of a file."""
    return str(request.param)


@pytest.fixture(scope="module")
def resumed(place: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run in this file ends with, resumed by a trainer of other weights and random numbers."""
    work_dir = tmp_path_factory.mktemp(place)
    (work_dir / "checkpoints").mkdir()
    shutil.copyfile(GOLDEN / f"{place}.pth", work_dir / "checkpoints" / "latest.pth")
    run = make_run(work_dir, seed=99, resume="auto")
    run.trainer.train()
    return finished(run) | {"random numbers": noise()}


# ---------------------------------------------------------------- the same by plain torch


def continued(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What the run in a file ends with, by a loop of its own; of the library only the order of the data is taken."""
    model, average = Net(), Net().eval()
    model.load_state_dict(saved["model"])
    average.load_state_dict(saved["ema"]["model"])
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(saved["optimizer"])
    num_updates, averaged = saved["progress"]["num_updates"], saved["ema"]["updates"]
    first, position = saved["progress"]["epoch"], saved["progress"]["position"]
    rows, best = saved["hooks"]["History"]["rows"], saved["hooks"]["EvalHook"]["cur_best"]
    stopping = saved["hooks"]["EarlyStoppingHook"]
    to_beat, num_bad = stopping["best"], stopping["num_bad_epochs"]
    rates = scheduled_rates()
    source = source_of(DataLoader(Samples(), BATCH_SIZE, shuffle=True), saved["seed"])
    set_random_numbers(saved["rng"][0])
    for epoch in range(first, MAX_EPOCHS):
        for batch, _ in source.epoch(epoch, position if epoch == first else 0):
            set_rates(optimizer, rates[epoch], num_updates)
            loss = train_one_iter(model.train(), optimizer, batch)
            num_updates, averaged = num_updates + 1, averaged + 1
            follow(average, model, EMA_DECAY * (1 - math.exp(-averaged / 2000)))
            lrs = [group["lr"] for group in optimizer.param_groups]
            rows = [*rows, {"indices": batch[2].tolist(), "lrs": lrs, "loss": loss}]
        error = mean_error(average)
        best = min(best, error)
        to_beat, num_bad = (error, 0) if error < to_beat else (to_beat, num_bad + 1)
        if num_bad == 4:
            break
    set_rates(optimizer, rates[epoch + 1], num_updates)
    kept = [f"epoch_{i}.pth" for i in range(epoch + 1)][-4:]
    return {
        "model": model.state_dict(),
        "ema": average.state_dict(),
        "ema_updates": averaged,
        "optimizer": optimizer.state_dict(),
        "hooks": {"history": rows, "kept": kept, "best": best, "stopping": [to_beat, num_bad]},
        "progress": [epoch + 1, len(rows), num_updates],
        "random numbers": noise(),
    }


def set_random_numbers(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy_state = dict(state["numpy"]["state"])
    numpy_state["key"] = numpy_state["key"].numpy()
    np.random.set_state({**state["numpy"], "state": numpy_state})
    torch.set_rng_state(state["torch"])


def scheduled_rates() -> list[list[float]]:
    """Of each epoch, one for each parameter group, by torch's own scheduler."""
    optimizer = make_optimizer(Net())
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(MAX_EPOCHS + 1):
        rates.append([float(lr) for lr in scheduler.get_last_lr()])
        optimizer.step()
        scheduler.step()
    return rates


def set_rates(optimizer: Optimizer, scheduled: list[float], num_updates: int) -> None:
    """The schedule's rates, times a factor that rises linearly from WARMUP_FACTOR to 1."""
    done = num_updates / WARMUP_ITERS
    factor = WARMUP_FACTOR * (1 - done) + done if done < 1 else 1.0
    for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
        group["lr"] = lr * factor


def train_one_iter(model: Net, optimizer: Optimizer, batch: Any) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def follow(average: Net, model: Net, decay: float) -> None:
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1.0 - decay)
    for copy, value in zip(average.buffers(), model.buffers(), strict=True):
        copy.copy_(value)


@torch.no_grad()
def mean_error(average: Net) -> float:
    errors = torch.cat([squared_errors(average, batch)["error"] for batch in HELD_OUT])
    return math.fsum(errors.tolist()) / len(errors)


# ---------------------------------------------------------------- tests


def test_the_files_stand_where_their_names_say(place: str) -> None:
    saved = golden(place)
    assert (saved["format"], saved["version"]) == ("torch_frame.state", 2)
    assert tuple(saved["progress"].values()) == PLACES[place].progress
    assert saved["progress"]["num_updates"] < WARMUP_ITERS
    assert saved["ema"]["updates"] == EMA_UPDATES + saved["progress"]["num_updates"]
    assert len(saved["optimizer"]["param_groups"]) == 2
    assert len(saved["hooks"]["History"]["rows"]) == saved["progress"]["iter"]


def test_it_ends_with_the_bits_of_plain_torch(place: str, resumed: dict[str, Any]) -> None:
    expected = continued(golden(place))
    assert differences({key: resumed[key] for key in expected}, expected) == []


def test_it_ends_where_the_uninterrupted_run_did(place: str, resumed: dict[str, Any]) -> None:
    """To the last bit on a machine like the one that the files were made on."""
    expected = golden("finished")
    made_on, expected["logged"] = expected.pop("environment"), expected["logged"][PLACES[place].num_logged :]
    came = {key: resumed[key] for key in expected}
    if environment() == made_on:
        assert differences(came, expected) == []
    assert list(numbers(came)) == pytest.approx(list(numbers(expected)), rel=1e-5, abs=1e-5)
    assert came["hooks"]["kept"] == expected["hooks"]["kept"]


def numbers(value: Any) -> Iterator[float]:
    """All numbers in nested tensors and containers, in their order."""
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)
