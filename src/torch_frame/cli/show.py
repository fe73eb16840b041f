"""`torch-frame show`: the table and the last block of a run, from its files; of several runs what differs, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch_frame.report.curves import short_names
from torch_frame.tracking.console import console_encoding, console_width, show_lines
from torch_frame.tracking.format import cells, duration, left, showable, value_text
from torch_frame.tracking.line import Line
from torch_frame.tracking.record import RunFiles
from torch_frame.tracking.summary import last_block
from torch_frame.tracking.table import BEST_MARK, Entry, Table

_GAP = "  "


def show(folders: Sequence[str]) -> int:
    """Print what the runs' files tell.

    Args:
        folders: work dirs.

    Returns:
        0.

    Raises:
        FileNotFoundError: for a folder that holds no run.
    """
    runs = [RunFiles.read(folder) for folder in folders]
    lines = _of_one(runs[0]) if len(runs) == 1 else _side_by_side(runs, folders)
    show_lines(lines)
    return 0


# ---------------------------------------------------------------- one run


def _of_one(run: RunFiles) -> Iterator[Line]:
    names = list(dict.fromkeys([*run.columns, *(name for entry in run.entries for name in entry.values)]))
    if not run.columns:
        names.sort(key=lambda name: name != "total_loss")
    widest = max((cells(entry.label) for entry in run.entries), default=0)
    table = Table(list(run.followed), run.facts.get("unit", "samples"), widest, console_encoding())
    width = console_width()
    for entry in run.entries:
        yield from table.lines(entry, names, width)
    left_out = table.left_out()
    if left_out:
        values = "another value" if len(left_out) == 1 else f"{len(left_out)} other values"
        yield Line(f"The screen is too narrow for {values}: see log.txt and metrics.jsonl.")
    last = run.entries[-1] if run.entries else None
    facts = {**run.facts, "how": run.how, "best": _bests(run)}
    for number, text in enumerate(last_block(run.folder, facts, last, width)):
        yield Line.title(text) if number == 0 else Line(text)


def _bests(run: RunFiles) -> dict[str, dict[str, Any]]:
    """The best values: those of `run.json`, else those that the table has marked."""
    found = {name: run.best(name) for name in run.followed}
    marked = {
        name: {"value": entry.values[name], "label": entry.label, "file": run.followed[name].get("file")}
        for name, entry in found.items()
        if entry is not None
    }
    return {**marked, **run.facts.get("best", {})}


# ---------------------------------------------------------------- several


def _side_by_side(runs: Sequence[RunFiles], folders: Sequence[str]) -> Iterator[Line]:
    """A column for each run: how it stands, the settings that differ, and the value that is followed, epoch by epoch."""
    names = short_names(folders)
    blocks = {
        "": _standing(runs),
        "settings that differ": _differences([run.settings for run in runs]),
        **{f"{showable(name)} by epoch": _by_epoch(runs, name) for name in _compared(runs)},
    }
    rows = {f"{title}\0{name}": row for title, block in blocks.items() for name, row in block.items()}
    of_names = max([cells(key.partition("\0")[2]) for key in rows] + [cells(title) for title in blocks])
    widths = [max(cells(text) for text in [name, *(row[i] for row in rows.values())]) for i, name in enumerate(names)]
    for chosen in _in_groups(widths, console_width() - of_names):
        yield from _grid(blocks, names, chosen, widths, of_names)


def _grid(
    blocks: Mapping[str, Mapping[str, list[str]]],
    names: Sequence[str],
    chosen: Sequence[int],
    widths: Sequence[int],
    of_names: int,
) -> Iterator[Line]:
    for title, block in blocks.items():
        if title and not block:
            yield Line(f"{title}: none")
            continue
        texts = [left(names[i], widths[i]) for i in chosen] if not title else []
        head = _GAP.join([left(title, of_names), *texts]).rstrip()
        yield Line.title(head)
        for name, row in block.items():
            cells_of_row = [left(row[i], widths[i]) for i in chosen]
            yield Line(_GAP.join([left(name, of_names), *cells_of_row]).rstrip())


def _in_groups(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Columns that fit beside each other; one that fits nowhere stands alone."""
    group: list[int] = []
    used = 0
    for index, width in enumerate(widths):
        if group and used + len(_GAP) + width > room:
            yield group
            group, used = [], 0
        group.append(index)
        used += len(_GAP) + width
    if group:
        yield group


def _standing(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    rows = {
        "state": [run.how for run in runs],
        "at": [run.entries[-1].label if run.entries else "" for run in runs],
        "time": [_time(run) for run in runs],
    }
    for name in dict.fromkeys(name for run in runs for name in run.followed):
        rows[f"best {showable(name)}"] = [_best(run, name) for run in runs]
    rows["last total_loss"] = [_last(run, "total_loss") for run in runs]
    return {name: row for name, row in rows.items() if any(row)}


def _time(run: RunFiles) -> str:
    seconds = run.facts.get("seconds")
    return duration(seconds) if isinstance(seconds, int | float) else ""


def _best(run: RunFiles, name: str) -> str:
    found = _bests(run).get(name)
    return "" if found is None else f"{value_text(found['value'])} ({found['label'][:1].lower()}{found['label'][1:]})"


def _last(run: RunFiles, name: str) -> str:
    found = [entry.values[name] for entry in run.entries if name in entry.values]
    return value_text(found[-1]) if found else ""


def _differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for one in settings for name in one)
    rows = {name: [_setting(one.get(name)) for one in settings] for name in names}
    return {showable(name): row for name, row in rows.items() if len(set(row)) > 1}


def _setting(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else showable(str(value))


def _compared(runs: Sequence[RunFiles]) -> list[str]:
    """The metrics that are followed; without one the total loss."""
    followed = dict.fromkeys(name for run in runs for name in run.followed)
    there = {name for run in runs for entry in run.entries for name in entry.values}
    return [name for name in followed if name in there] or [name for name in ("total_loss",) if name in there]


def _by_epoch(runs: Sequence[RunFiles], name: str) -> dict[str, list[str]]:
    of_runs = [{_place(entry): _cell(entry, name) for entry in run.entries if name in entry.values} for run in runs]
    places = sorted({place for one in of_runs for place in one})
    rows = {place: [one.get(place, "") for one in of_runs] for place in places}
    return {word if number < 0 else f"{word} {number}": row for (word, number), row in rows.items()}


def _place(entry: Entry) -> tuple[str, int]:
    """Where in its run an entry stands: runs of different lengths are compared epoch by epoch."""
    word, _, number = entry.label.partition(" ")
    done = number.partition("/")[0]
    return (word, int(done)) if done.isdecimal() else (entry.label, -1)


def _cell(entry: Entry, name: str) -> str:
    return value_text(entry.values[name]) + (BEST_MARK if name in entry.best else "")
