"""What a run leaves for people who look at it later: `run.json`, and `table.jsonl` with the lines of its table.

`torch-frame show` reads them. A file that cannot be written ends no run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_frame.tracking.format import showable
from torch_frame.tracking.processes import is_alive
from torch_frame.tracking.table import Entry, number_from_json

_logger = logging.getLogger("torch_frame")

RUN_FILE = "run.json"
TABLE_FILE = "table.jsonl"


class RunRecord:
    """Writes the two files of a run.

    Args:
        folder: the run's work dir.
        resumed_iter: iterations that were done when the run was resumed: later lines are cut off; None: it begins anew.

    Attributes:
        num_lines: of the table.
    """

    def __init__(self, folder: str, resumed_iter: int | None) -> None:
        self._folder = Path(folder)
        self._resumed_iter = resumed_iter
        self._facts: dict[str, Any] = {}
        self._is_off = False
        self.num_lines = 0

    def begin(self, facts: Mapping[str, Any], num_lines: int | None = None) -> None:
        """Write what is known when the run begins, and cut the table to where it continues.

        Args:
            facts: names and plain values.
            num_lines: the lines that the table had when the state was saved that the run continues; None: not known.
        """
        now = {
            "started": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "ended": None,
            "how": "running",
        }
        self._facts = {**facts, **now}
        with self._told():
            before = _object_in(self._folder / RUN_FILE) if self._resumed_iter is not None else {}
            self._facts["seconds_before"] = _seconds_of(before)
            self._write_facts()
            self._cut_table(num_lines)

    def add(self, entry: Entry) -> None:
        """Append a line of the table."""
        self.num_lines += 1
        text = json.dumps(_plain(entry.as_row()), ensure_ascii=False) + "\n"
        with self._told(), open(self._folder / TABLE_FILE, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def note(self, **facts: Any) -> None:
        """Write down what has become known of the run since it began."""
        self._facts |= facts
        with self._told():
            self._write_facts()

    def end(self, how: str, **facts: Any) -> None:
        """Write how the run has ended; a run that is killed leaves "running"."""
        if not self._facts:
            return
        self._facts |= {"ended": time.time(), "how": how, **facts}
        with self._told():
            self._write_facts()

    @property
    def seconds_before(self) -> float:
        """How long the run had been under way before it was resumed."""
        return float(self._facts.get("seconds_before", 0.0))

    def _cut_table(self, num_lines: int | None) -> None:
        path = self._folder / TABLE_FILE
        kept = [] if self._resumed_iter is None else [e for e in entries_in(path) if e.iter < self._resumed_iter]
        kept = kept[:num_lines]
        self.num_lines = len(kept)
        _replace(path, "".join(json.dumps(_plain(e.as_row()), ensure_ascii=False) + "\n" for e in kept))

    def _write_facts(self) -> None:
        _replace(self._folder / RUN_FILE, json.dumps(_plain(self._facts), ensure_ascii=False, indent=1) + "\n")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder that is gone
            if not self._is_off:
                self._is_off = True
                _logger.warning(
                    "%s or %s in the work dir, which torch-frame show reads, cannot be written (%s); the run goes on.",
                    RUN_FILE,
                    TABLE_FILE,
                    error,
                )


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it.

    Attributes:
        folder: of the run.
        facts: of `run.json`; empty if there is none.
        entries: lines of the table.
    """

    folder: Path
    facts: Mapping[str, Any]
    entries: list[Entry]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunFiles:
        """Read a run's files; one of an older version has rows of `metrics.jsonl` only.

        Raises:
            FileNotFoundError: if the folder holds no run.
        """
        path = Path(folder)
        facts, entries = checked_facts(_object_in(path / RUN_FILE)), entries_in(path / TABLE_FILE)
        if not entries:
            entries = _entries_of_metrics(path / "metrics.jsonl", facts.get("max_epochs"))
        if not path.exists():
            raise FileNotFoundError(f"There is no folder {folder}.")
        if not facts and not entries:
            raise FileNotFoundError(
                f"{folder} holds no run: there is no {RUN_FILE}, {TABLE_FILE} or metrics.jsonl. Give the work dir of a run, as "
                "its first lines name it."
            )
        return cls(path, facts, entries)

    @property
    def settings(self) -> dict[str, Any]:
        """name -> value."""
        return dict(self.facts.get("settings", {}))

    @property
    def how(self) -> str:
        """ "finished", "stopped", "failed", "running", "killed" (its process is gone), or "unknown"."""
        how = str(self.facts.get("how", "unknown"))
        is_here = self.facts.get("host") == socket.gethostname()
        is_gone = is_here and not is_alive(self.facts.get("pid"), self.facts.get("started"))
        return "killed" if how == "running" and is_gone else how

    @property
    def columns(self) -> list[str]:
        """Names of the table's values in the order in which the run has shown them; [] if it does not say."""
        return list(self.facts.get("columns", []))

    @property
    def followed(self) -> dict[str, dict[str, Any]]:
        """metric -> {"max_first": bool, "file": name or None}."""
        return dict(self.facts.get("followed", {}))

    def best(self, metric: str) -> Entry | None:
        """The line of the best value, by the marks that the run has made; None if it has made none."""
        return next(
            (entry for entry in reversed(self.entries) if metric in entry.best and metric in entry.values), None
        )


def checked_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is of the form that it is read in; the rest, of a damaged or foreign file, is left out.

    >>> checked_facts(
    ...     {"how": "finished", "iter": "many", "best": {"acc": {"value": None, "label": "Epoch 1", "file": 3}}}
    ... )
    {'how': 'finished', 'best': {}}
    """
    facts: dict[str, Any] = {}
    for name, read in _FORMS.items():
        try:
            facts |= {} if found.get(name) is None else {name: read(found[name])}
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            continue
    return facts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return showable(value)


def _file(value: Any) -> str | None:
    return None if value is None else _text(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _mapping(value: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    """Each item by itself: one that is damaged costs no other."""
    items = {}
    for name, item in value.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, AttributeError):
            items[name] = read(item)
    return items


def _best(value: Any) -> dict[str, Any]:
    found, label = number_from_json(value["value"]), _text(value["label"])
    return {"value": found, "label": label, "file": _file(value.get("file"))}


def _followed(value: Any) -> dict[str, Any]:
    return {"max_first": bool(value.get("max_first", True)), "file": _file(value.get("file"))}


_FORMS: dict[str, Callable[[Any], Any]] = {
    "how": _text,
    "error": _text,
    "host": _text,
    "command": _text,
    "unit": _text,
    "iter": _count,
    "pid": _count,
    "max_epochs": _count,
    "started": number_from_json,
    "seconds": number_from_json,
    "seconds_before": number_from_json,
    "split": lambda value: _mapping(value, number_from_json),
    "best": lambda value: _mapping(value, _best),
    "followed": lambda value: _mapping(value, _followed),
    "columns": lambda value: [_name(name) for name in value],
    "scores": lambda value: [_name(name) for name in value],
    "settings": dict,
}


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def entries_in(path: Path) -> list[Entry]:
    """The lines of a table; what cannot be read is left out, such as a line that a killed process has half written."""
    return [entry for row in _rows_in(path) if (entry := _entry_of(row)) is not None]


def _entry_of(row: Mapping[str, Any]) -> Entry | None:
    try:
        return Entry.from_row(row)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None


def _entries_of_metrics(path: Path, max_epochs: Any) -> list[Entry]:
    """One line for each epoch of `metrics.jsonl`: its last values."""
    of_epochs: dict[int, dict[str, Any]] = {}
    for row in _rows_in(path):
        if isinstance(row.get("epoch"), int):
            of_epochs.setdefault(row["epoch"], {}).update(row)
    total = f"/{max_epochs}" if isinstance(max_epochs, int) else ""
    entries = []
    for epoch, row in of_epochs.items():
        names = row.keys() - {"iter", "epoch", "time", "lr", "data_time", "iter_time"}
        values = {name: row[name] for name in row if name in names}
        known = {"label": f"Epoch {epoch + 1}{total}", "iter": row.get("iter", 0), "epoch": epoch, "values": values}
        entry = _entry_of({**known, "lr": [row["lr"]] if isinstance(row.get("lr"), float) else []})
        entries += [] if entry is None else [entry]
    return entries


def _rows_in(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = (_parsed(line) for line in lines)
    return [row for row in rows if isinstance(row, dict)]


def _object_in(path: Path) -> dict[str, Any]:
    try:
        found = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _seconds_of(facts: Mapping[str, Any]) -> float:
    """How long a run has taken by its file, earlier parts included; of a killed one up to its last line nothing is known."""
    value = facts.get("seconds", facts.get("seconds_before", 0.0))
    return float(value) if isinstance(value, int | float) else 0.0


def _plain(value: Any) -> Any:
    """For JSON: NaN is null, infinities are texts, and so is what is neither number nor text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _replace(path: Path, text: str) -> None:
    """A file is whole at every moment."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)
