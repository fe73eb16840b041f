"""Starts the training script, kills it, resumes it, and reads what it has left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from tests.small_data import wait_until
from tests.small_runs import environment
from torch_frame import Trainer
from torch_frame.checkpoint.format import VERSION

SCRIPT = Path(__file__).with_name("training.py")
TIMES = ("time", "data_time", "iter_time")
"""What differs from run to run in metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the script loads its data ("own": a loader that the trainer leaves as it is), and what it trains: see `training.py`."""

    loader: str = "plain"
    workers: int = 0
    context: str = "fork"
    eval_workers: int = 0
    task: str = "one"

    @property
    def options(self) -> list[str]:
        workers = ["--workers", str(self.workers), "--eval-workers", str(self.eval_workers)]
        return ["--loader", self.loader, *workers, "--context", self.context, "--task", self.task]

    @property
    def uninterrupted(self) -> Config:
        """The configuration whose uninterrupted run this one is compared with."""
        return Config("infinite" if self.workers else "plain", self.workers, task=self.task)

    def __str__(self) -> str:
        name = f"{self.loader}-{self.workers}" + (f"-{self.task}" if self.task != "one" else "")
        name += f"-eval-{self.eval_workers}" if self.eval_workers else ""
        return name + (f"-{self.context}" if self.workers or self.eval_workers else "")


CONFIGS = [
    Config("plain", 0),
    Config("plain", 2, "fork"),
    Config("plain", 2, "spawn"),
    Config("persistent", 2, "fork"),
    Config("infinite", 0),
    Config("infinite", 2, "fork"),
    Config("infinite", 2, "spawn"),
    Config("plain", 0, task="two-optimizers"),
    Config("plain", 2, "fork", task="hook-subclass"),
]
if VERSION >= 3:  # the optimizer's tensors that the model does not have are saved from then on
    CONFIGS.append(Config("plain", 0, task="loss-with-weights"))
if "save_frozen" in inspect.signature(Trainer).parameters:
    CONFIGS.append(Config("plain", 0, task="save-frozen"))


# ---------------------------------------------------------------- a process


class Training:
    """The script, under way in a process group of its own.

    Args:
        folder: where the run is.
        options: of the script.
        by_shell: `bash -c 'script; echo $?'`: the status that a shell sees is `shell_status`.
    """

    def __init__(self, folder: Path, *options: str, by_shell: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_events = len(events(folder))
        self._started = time.time()
        self.output = folder / f"output_{len(list(folder.glob('output_*')))}.txt"
        command = [sys.executable, "-W", "error", str(SCRIPT), str(folder), *options]
        if by_shell:  # which must outlive a signal to the group, and have its child begin with the default handlers
            command = ["bash", "-c", 'trap : INT TERM USR1 USR2; "$@"; echo "status $?"', "bash", *command]
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command,
                env=environment(OMP_NUM_THREADS="1", PYTHONFAULTHANDLER="1"),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_group()

    def events(self, what: str | None = None) -> list[dict[str, Any]]:
        """What has happened since this process was started."""
        return [e for e in events(self.folder)[self.num_events :] if what in (None, e["what"])]

    def wait_for(self, what: str, times: int = 1, seconds: float = 60.0) -> dict[str, Any]:
        """The event, once it has come so many times."""
        came = wait_until(lambda: len(self.events(what)) >= times or self.process.poll() is not None, seconds)
        found = self.events(what)
        assert came, f"no {what} came in {seconds} s:\n{self.tail()}"
        assert len(found) >= times, f"it has ended before {what} came:\n{self.tail()}"
        return found[times - 1]

    @property
    def pid(self) -> int:
        """Of the training process itself."""
        pid: int = self.wait_for("begin")["pid"]
        return pid

    @property
    def slowness(self) -> float:
        """How many times longer than on a quiet machine things take here: by the time until the training began."""
        return max(1.0, (self.wait_for("begin")["time"] - self._started) / 4.0)

    def send(self, number: int, *, to_group: bool = False) -> None:
        if to_group:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120.0) -> int:
        """The status that the process ends with."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended in {seconds} s:\n{self.tail()}") from None

    def shell_status(self, seconds: float = 120.0) -> int:
        assert self.wait(seconds) == 0, self.tail()
        found = re.search(r"^status (\d+)$", self.output.read_text(), re.MULTILINE)  # others may write behind it
        assert found is not None, self.tail()
        return int(found[1])

    def kill_group(self) -> None:
        """Kill what is left of the process and its workers, as the end of a container does."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(30)
        assert wait_until(lambda: not self.members())

    def members(self) -> list[int]:
        """Processes of the group that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            except OSError:  # it has ended
                continue
            if int(group) == self.process.pid and state != "Z":
                found.append(int(folder.name))
        return found

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.output.read_text().splitlines()[-lines:])


# ---------------------------------------------------------------- what a run has left behind


def events(folder: Path, what: str | None = None) -> list[dict[str, Any]]:
    """What has happened in a run, in all of its processes; of one kind where it is named."""
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in found if what in (None, event["what"])]


def checkpoints(folder: Path) -> Path:
    return folder / "run" / "checkpoints"


def is_whole(path: Path) -> bool:
    """Whether the file ends with the sha256 of all that stands before it."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-64]).hexdigest().encode() == content[-64:]


def saved_iter(path: Path) -> int:
    """Up to which iteration a state has come; the file must be whole, and readable without torch-frame."""
    assert is_whole(path), f"{path} is damaged"
    state = torch.load(path, weights_only=True)
    iterations: int = state["progress"]["iter"]
    return iterations


def temporary_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tmp"))


def result(folder: Path) -> dict[str, Any]:
    """What the script has written at its end: "sha256" and "parts"."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times; every line must be whole."""
    text = (folder / "run" / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: tag -> (step, value) in the order of the files, without the times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "run" / "tb_logs"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag.rsplit("/", 1)[-1] not in TIMES]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


# ---------------------------------------------------------------- kills

# (point, the least and the most times that it is reached before the kill)
STEP = [
    *(("forward", 1, 5), ("backward", 1, 5), ("before_iter", 1, 5), ("after_iter", 1, 5), ("sample", 1, 8)),
    *(("before_update", 1, 2), ("stepped", 1, 2), ("after_update", 1, 2)),
]
SAVE = [("write", 1, 3), ("verify", 1, 6), ("link", 1, 2), ("rename", 1, 4), ("renamed", 1, 3), ("remove", 1, 6)]
INSIDE_A_SAVE = [("verify", 1, 6), ("link", 1, 2), ("rename", 1, 4)]  # where the temporary file is there for certain
EPOCH_END = [("evaluate", 2, 4), ("evaluated", 1, 1), ("logged", 1, 1)]
RESUMING = [("before_train", 1, 1), ("curves", 1, 2), ("before_epoch", 1, 1)]
BEFORE_BEGIN = [("remove", 1, 1)]  # of a temporary file that the kill before has left
ANY_MOMENT = [("before_train", 1, 1)]  # and a time after it
KINDS = {
    "step": STEP,
    "save": SAVE,
    "inside a save": INSIDE_A_SAVE,
    "before begin": BEFORE_BEGIN,
    "epoch's end": EPOCH_END,
    "resuming": RESUMING,
    "any moment": ANY_MOMENT,
}

_BEFORE_TWO_SAVES = {
    "forward": 7,
    "backward": 7,
    "before_iter": 7,
    "after_iter": 7,
    "before_update": 2,
    "stepped": 2,
    "sample": 24,
    "after_update": 2,
    "write": 2,
    "verify": 5,
    "link": 1,
    "rename": 4,
    "renamed": 2,
    "remove": 6,
}
"""So many times each point is reached before two saves are complete: a first kill comes later, so that it leaves a state."""


def draw(kind: str, rng: random.Random, *, first: bool) -> str:
    """A point to be killed at; see `training.Fault`."""
    if first and kind in ("before begin", "resuming", "any moment"):
        kind = "step"
    point, least, most = rng.choice(KINDS[kind])
    before = _BEFORE_TWO_SAVES.get(point, 0) if first else 0
    at = f"{point}:{before + rng.randint(least, most)}"
    if kind == "save" and rng.random() < 0.5:  # in the middle of what begins there
        at += f"+{rng.uniform(0, 2):.2f}"
    elif kind == "any moment":
        at += f"+{rng.uniform(0, 400):.2f}"
    return at


@dataclasses.dataclass(frozen=True)
class Kill:
    """A process that was killed, and what it left.

    Attributes:
        at: the point.
        saved_iter: of `latest.pth`.
        was_saving: a file was half written, or had not got all of its names.
        began: the training had begun. A resumed run first removes half-written files, and may be killed there.
        iter: the last one that had begun.
    """

    at: str
    saved_iter: int
    was_saving: bool
    began: bool
    iter: int


@dataclasses.dataclass
class Series:
    """Runs of one configuration, killed and resumed until the kills are used up and every run has come to its end.

    Attributes:
        kills: in their order.
        finished: folders of the runs.
    """

    config: Config
    seed: int
    kills: list[Kill] = dataclasses.field(default_factory=list)
    finished: list[Path] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        kills = ", ".join(f"{kill.at} (iteration {kill.iter}, saved {kill.saved_iter})" for kill in self.kills)
        return f"{self.config}, seed {self.seed}, killed at {kills}"


def kill_and_resume(folder: Path, config: Config, kinds: Sequence[str], seed: int) -> Series:
    """Train, killed once for each of `kinds`; a run that ends before its kill comes is followed by another one.

    Everything that is said of a resumed run is checked here: `latest.pth` is whole at every death and never older than at the
    death before, the run goes on from it, and repeats no iteration before it. A process killed before its training begins
    changes no checkpoint.
    """
    series = Series(config, seed)
    rng = random.Random(seed)
    left = list(kinds)
    while left:
        run = folder / f"run_{len(series.finished)}"
        _train_to_the_end(run, series, left, rng)
        series.finished.append(run)
    return series


def _train_to_the_end(run: Path, series: Series, left: list[str], rng: random.Random) -> None:
    saved: int | None = None
    while True:
        at = draw(left[0], rng, first=saved is None) if left else ""
        # A resumed run begins with other weights and other random numbers, so that all it has is from the checkpoint.
        seed = 0 if saved is None else rng.randint(1, 1000)
        if saved is not None and rng.random() < 0.5:
            _write_half_a_row(run, saved)
        saving_before, files_before = _traces_of_a_save(run), _checkpoint_digests(run)
        with Training(run, *series.config.options, "--seed", str(seed), "--at", at) as training:
            status = training.wait()
            where = f"{series}; now {at or 'to the end'}:\n{training.tail()}"
        if status == 0:
            _check_that_it_went_on(training, saved, where)
            return
        assert status == -signal.SIGKILL, where
        began = _check_what_came_before_the_kill(training, saved, files_before, where)
        saved = _check_files(run, saved, where)
        iterations = [event["iter"] for event in training.events("iter")]
        was_saving = bool(_traces_of_a_save(run) - saving_before)
        series.kills.append(Kill(at, saved, was_saving, began, iterations[-1] if iterations else saved))
        left.pop(0)


def _check_what_came_before_the_kill(
    training: Training, saved: int | None, files_before: dict[str, str], where: str
) -> bool:
    """Returns whether the training had begun. If it had not, no iteration was made and no checkpoint is another one."""
    assert training.events("signal"), f"something else than the script's own fault has killed it; {where}"
    if training.events("begin"):
        _check_that_it_went_on(training, saved, where)
        return True
    assert not training.events("iter"), where
    assert _checkpoint_digests(training.folder) == files_before, where
    return False


def _check_that_it_went_on(training: Training, saved: int | None, where: str) -> None:
    begin = training.events("begin")
    assert len(begin) == 1, where
    assert begin[0]["resumed_iter"] == saved, f"saved {saved}, went on from {begin[0]['resumed_iter']}; {where}"
    iterations = [event["iter"] for event in training.events("iter")]
    assert iterations == list(range(saved or 0, (saved or 0) + len(iterations))), where


def _check_files(run: Path, saved_before: int | None, where: str) -> int:
    saved = saved_iter(checkpoints(run) / "latest.pth")
    assert saved > 0, where
    assert saved >= (saved_before or 0), f"{saved_before} was saved, now {saved}; {where}"
    for path in checkpoints(run).glob("*.pth"):
        assert is_whole(path), f"{path.name} is damaged; {where}"
    return saved


def _checkpoint_digests(run: Path) -> dict[str, str]:
    """Name -> sha256 of the checkpoints, without temporary files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoints(run).glob("*.pth")}


def _traces_of_a_save(run: Path) -> set[tuple[str, int, int]]:
    """Temporary files; and latest and previous where they are one file, which is so until the new one gets its name."""
    found = list(checkpoints(run).glob("*.tmp"))
    latest, previous = checkpoints(run) / "latest.pth", checkpoints(run) / "previous.pth"
    if previous.exists() and latest.samefile(previous):
        found.append(previous)
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def _write_half_a_row(run: Path, saved: int) -> None:
    """What a death in the middle of a write leaves."""
    with open(run / "run" / "metrics.jsonl", "a") as file:
        file.write(f'{{"iter": {saved + 1}, "epoch": 0, "time": 17')


# ---------------------------------------------------------------- uninterrupted


class Uninterrupted:
    """Uninterrupted runs, each made when it is first asked for.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[Config, Path] = {}

    def __getitem__(self, config: Config) -> Path:
        """The folder of the run that a configuration is compared with."""
        config = config.uninterrupted
        if config not in self._runs:
            with Training(self._folder / str(config), *config.options) as run:
                assert run.wait() == 0, run.tail()
            self._runs[config] = run.folder
        return self._runs[config]


# ---------------------------------------------------------------- several at a time


class Ahead:
    """Work that is done three pieces at a time, ahead of the tests that look at it: a process often waits.

    Args:
        work: case -> what came of it.
        cases: in the order in which they will be asked for.
    """

    def __init__(self, work: Callable[[Any], Any], cases: Iterable[Any]) -> None:
        self._pool = ThreadPoolExecutor(3)
        self._futures = {case: self._pool.submit(work, case) for case in dict.fromkeys(cases)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self, case: Any) -> Any:
        return self._futures[case].result()


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """The values of a parameter, of all tests of this module that will run."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    found = [item.callspec.params for item in items if item.module is request.module and hasattr(item, "callspec")]
    return [params[name] for params in found if name in params]
