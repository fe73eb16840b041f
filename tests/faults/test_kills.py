"""A run that is killed anywhere, again and again, ends bitwise where the uninterrupted one does, and so do its curves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kit import (
    CONFIGS,
    Ahead,
    Config,
    Series,
    Training,
    Uninterrupted,
    curves,
    kill_and_resume,
    result,
    rows,
    selected,
    temporary_files,
)
from tests.small_data import wait_until

SEED = int(os.environ.get("FAULTS_SEED", "0"))
FEW = {config: ["inside a save", "step" if config.workers else "epoch's end"] for config in CONFIGS}  # 22 kills
FEW[Config("infinite", 0)] = ["step", "save"]
FEW[Config("plain", 2, "spawn")] = ["save", "epoch's end"]
MANY = {config: 10 if config.context == "spawn" else 20 for config in CONFIGS}  # 200 kills


def many(config: Config) -> list[str]:
    """Kinds of kills, in a random order."""
    return random.Random(f"{SEED} {config}").choices(
        ["step", "save", "epoch's end", "resuming", "any moment"], [4, 5, 2, 1, 3], k=MANY[config]
    )


@pytest.fixture(scope="module")
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    """What has become of (configuration, whether it is killed many times), and of workers that were left alone."""
    folder = tmp_path_factory.mktemp("killed")

    def work(case: tuple[Config, bool] | str) -> Any:
        if isinstance(case, str):
            return orphans(folder / case, case)
        config, often = case
        kinds = many(config) if often else FEW[config]
        return kill_and_resume(folder / f"{config}_{len(kinds)}", config, kinds, SEED)

    with Ahead(work, [*selected(request, "case"), *selected(request, "orphaned")]) as ahead:
        yield ahead


def orphans(folder: Path, context: str) -> tuple[int, float, float]:
    """Kill a training process alone: the number of its workers then, the seconds until all had ended, how slow the machine is."""
    with Training(folder, *Config("infinite", 2, context).options, "--at", "forward:9") as training:
        assert training.wait() == -signal.SIGKILL
        num_workers, killed_at = len(training.members()), time.monotonic()
        assert wait_until(lambda: not training.members(), 120), f"{training.members()} still run"
        return num_workers, time.monotonic() - killed_at, training.slowness


CASES = [
    *(pytest.param((config, False), id=str(config)) for config in CONFIGS),
    *(
        pytest.param((config, True), id=f"{config}-often", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
        for config in CONFIGS
    ),
]
every_case = pytest.mark.parametrize("case", CASES)


def test_22_kills_come_and_200_where_asked_for() -> None:
    if len(CONFIGS) == 11:
        assert sum(len(kinds) for kinds in FEW.values()) == 22
        assert sum(MANY.values()) == 200


@every_case
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(
    case: Any, killed: Ahead, reference: Uninterrupted
) -> None:
    series: Series = killed.result(case)
    expected = result(reference[series.config])
    for folder in series.finished:
        came = result(folder)
        differing = [name for name, digest in came["parts"].items() if digest != expected["parts"][name]]
        assert came["sha256"] == expected["sha256"], f"{', '.join(differing)} differ; {series}"


@every_case
def test_each_kill_was_one_and_a_state_was_there(case: Any, killed: Ahead) -> None:
    series: Series = killed.result(case)
    assert len(series.kills) == len(many(series.config) if case[1] else FEW[series.config])
    assert all(kill.saved_iter > 0 for kill in series.kills), series
    assert len(series.finished) >= 1


def test_some_were_killed_inside_a_save(killed: Ahead) -> None:
    series = [killed.result((config, False)) for config in CONFIGS]
    assert sum(kill.was_saving for one in series for kill in one.kills) >= 4, [str(one) for one in series]


@every_case
def test_metrics_jsonl_is_that_of_the_uninterrupted_run(case: Any, killed: Ahead, reference: Uninterrupted) -> None:
    series: Series = killed.result(case)
    for folder in series.finished:
        assert rows(folder) == rows(reference[series.config]), str(series)


@every_case
def test_tensorboard_shows_the_curves_of_the_uninterrupted_run(
    case: Any, killed: Ahead, reference: Uninterrupted
) -> None:
    pytest.importorskip("tensorboard")
    series: Series = killed.result(case)
    expected = curves(reference[series.config])
    for folder in series.finished:
        came = curves(folder)
        assert came.keys() == expected.keys()
        for tag, curve in expected.items():
            assert came[tag] == curve, f"{tag}; {series}"


@every_case
def test_no_temporary_file_is_left_at_the_end(case: Any, killed: Ahead) -> None:
    for folder in killed.result(case).finished:
        assert not temporary_files(folder)


def test_a_kill_before_training_begins_changes_nothing(tmp_path: Path, reference: Uninterrupted) -> None:
    """A resumed run first removes what the kill inside a save has left; it is killed there, and resumed again."""
    series = kill_and_resume(tmp_path, Config("plain", 0), ["inside a save", "before begin"], SEED)
    inside, before = series.kills
    assert inside.was_saving
    assert inside.began
    assert not before.began
    assert before.saved_iter == inside.saved_iter
    assert len(series.finished) == 1
    assert result(series.finished[0]) == result(reference[Config("plain", 0)])
    assert rows(series.finished[0]) == rows(reference[Config("plain", 0)])
    assert not temporary_files(series.finished[0])


def test_the_run_is_the_same_without_workers_and_with_them(reference: Uninterrupted) -> None:
    assert result(reference[Config("plain", 0)]) == result(reference[Config("infinite", 2)])
    assert rows(reference[Config("plain", 0)]) == rows(reference[Config("infinite", 2)])


@pytest.mark.parametrize("orphaned", ["fork", "spawn"])
def test_workers_end_by_themselves_when_the_training_process_is_killed(orphaned: str, killed: Ahead) -> None:
    num_workers, seconds, slowness = killed.result(orphaned)
    assert num_workers >= 2
    assert seconds < 12 * slowness  # torch's workers look for their parent every 5 s
