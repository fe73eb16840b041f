"""The last block of a run: what came out, where it lies, and what to do next."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_frame.tracking.format import ago, aligned, counted, duration, shares, showable, size_text, value_text
from torch_frame.tracking.table import Entry

_VALUES_SHOWN = 4
_OF_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun, accelerate launch
RUNNING, FINISHED, STOPPED, FAILED, KILLED = "running", "finished", "stopped", "failed", "killed"


def last_block(folder: str | os.PathLike[str], facts: Mapping[str, Any], last: Entry | None, width: int) -> list[str]:
    """The lines of the block.

    Args:
        folder: of the run.
        facts: of `run.json` when the run has ended: `how`, `error`, `iter`, `seconds`, `split`, `best`, `followed`, `scores`,
            `command`.
        last: the table's last line.
        width: cells of the screen.
    """
    path = Path(folder)
    checkpoints = Path(os.path.normpath(path / str(facts.get("checkpoints", "checkpoints"))))
    rows = {
        "best": _best_row(checkpoints, facts.get("best")),
        "last": _last_row(last, facts),
        "time": _time_row(facts),
        "state": _saved_row(checkpoints),
        "files": _files_row(path),
        "next": "\n".join(_next_steps(path, checkpoints, facts)),
    }
    return [
        _title(facts, last),
        *aligned({name: text for name, text in rows.items() if text}, width, unbroken=["next"]),
    ]


def _title(facts: Mapping[str, Any], last: Entry | None) -> str:
    how = facts.get("how")
    place = f"{last.label}, batch {facts.get('iter', last.iter + 1)}" if last is not None else "the first epoch"
    if how == FINISHED:
        return f"Finished: {_counted(last)}." if last is not None else "Finished: nothing was left to train."
    if how == STOPPED:
        return f"Stopped after batch {facts.get('iter', 0):,} of the run."
    if how == FAILED:
        return f"Failed after batch {facts.get('iter', 0):,} of the run: {facts.get('error', 'an error')}."
    if how == KILLED:
        return f"Killed, or ended without a word, behind {place}; {_since(facts)}."
    return f"Running: {place}; {_since(facts)}." if how == RUNNING else f"As far as {place}."


def _counted(last: Entry) -> str:
    epochs = [counted(last.epoch + 1, "epoch")] if last.label.startswith("Epoch") else []
    return ", ".join([*epochs, counted(last.iter + 1, "batch", "batches")])


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:]


def _since(facts: Mapping[str, Any]) -> str:
    where = f"process {facts.get('pid')} on {facts.get('host')}"
    started = facts.get("started")
    return f"{where}, begun {ago(time.time() - started)}" if isinstance(started, int | float) else where


def _best_row(checkpoints: Path, best: Any) -> str:
    if not isinstance(best, Mapping):
        return ""
    lines = []
    for metric, found in best.items():
        file = found.get("file")
        where = f": {checkpoints / file}" if file and (checkpoints / file).exists() else ""
        lines.append(f"{showable(metric)} {value_text(float(found['value']))} in {_lower(found['label'])}{where}")
    return "\n".join(lines)


def _last_row(last: Entry | None, facts: Mapping[str, Any]) -> str:
    if last is None:
        return ""
    wanted = dict.fromkeys(["total_loss", *facts.get("followed", ()), *facts.get("scores", ())])
    names = [name for name in wanted if name in last.values] or list(last.values)
    return ", ".join(f"{showable(name)} {value_text(last.values[name])}" for name in names[:_VALUES_SHOWN])


def _time_row(facts: Mapping[str, Any]) -> str:
    seconds, split = facts.get("seconds"), facts.get("split")
    if not isinstance(seconds, int | float):
        return ""
    parts = shares({name: float(part) for name, part in split.items()}) if isinstance(split, Mapping) else ""
    return f"{duration(seconds)}{': ' if parts else ''}{parts}"


def _saved_row(checkpoints: Path) -> str:
    """What a run can be continued from."""
    for name in ("latest.pth", "previous.pth"):
        try:
            status = (checkpoints / name).stat()
        except OSError:
            continue
        age = ago(time.time() - status.st_mtime)
        return f"{checkpoints / name}, {size_text(status.st_size)}, {age}"
    return ""


def _files_row(folder: Path) -> str:
    there = [name for name in ("log.txt", "metrics.jsonl", "tb_logs") if (folder / name).exists()]
    return f"{folder}: {', '.join(there)}" if there else str(folder)


def _next_steps(folder: Path, checkpoints: Path, facts: Mapping[str, Any]) -> list[str]:
    how = facts.get("how")
    if how in (STOPPED, FAILED, KILLED):
        return _to_continue(checkpoints, facts)
    steps = [f"torch-frame show {shlex.quote(str(folder))}"]
    if (folder / "tb_logs").exists():
        steps.append(f"tensorboard --logdir {shlex.quote(str(folder / 'tb_logs'))}")
    weights = [found.get("file") for found in (facts.get("best") or {}).values()] or ["best.pth"]
    if how == FINISHED and weights[0] and (checkpoints / weights[0]).exists():
        steps.append(f"model.load_state_dict(torch.load({str(checkpoints / weights[0])!r}))")
    return steps


def _to_continue(checkpoints: Path, facts: Mapping[str, Any]) -> list[str]:
    latest = checkpoints / "latest.pth"
    if not latest.exists():
        return ["nothing was saved yet: the run begins anew"]
    return [
        f"to continue: {facts.get('command') or 'the same command'}",
        'with Trainer(..., resume="auto"), or after',
        f"trainer.load_checkpoint({str(latest)!r})",
    ]


def command_line(words: Sequence[str] | None = None) -> str | None:
    """How this process was started, to be typed again; None if that is no command (a notebook, a text behind python's `-c`), or
    a launcher has started it with settings of its own.

    >>> command_line(["/usr/bin/python3", "-u", "train.py", "--name", "a b", "-c", "small.yaml"])
    "python3 -u train.py --name 'a b' -c small.yaml"
    >>> command_line(["python3", "-u", "-c", "import train"]) is None
    True
    """
    words = list(sys.orig_argv if words is None else words)
    of_python = list(itertools.takewhile(lambda word: word != "-m" and not word.endswith(".py"), words[1:]))
    if not words or any("ipykernel" in word for word in words[:4]) or "-c" in of_python:
        return None
    if any(name in os.environ for name in _OF_LAUNCHERS):
        return None
    line = shlex.join([os.path.basename(words[0]), *words[1:]])
    return line if len(line) <= 300 and "\n" not in line else None
