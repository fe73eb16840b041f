"""The table of a run: one line an epoch, in columns that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch_frame.tracking.format import (
    VALUE_WIDTH,
    cells,
    duration,
    left,
    rate_text,
    rates_width,
    right,
    shortened,
    showable,
    speed_text,
    value_text,
)
from torch_frame.tracking.line import Line

LINES_BELOW_A_HEADER = 40
_NAME_WIDTH = 18
_GAP = "  "
BEST_MARK = "*"


@dataclass(frozen=True)
class Entry:
    """What one line says.

    Attributes:
        label: such as "Epoch 3/20".
        iter, epoch: index of the last batch, and of the epoch.
        values: name -> value: of the step's values the means, and the scores that are new.
        best: names of the values that are the best so far.
        lr: of each group of the optimizer.
        per_s: samples, or batches, a second.
        time_s: since the line before.
        eta_s: of the whole run; None: not known.
        memory_mib: the most that the run has held on its accelerator; None: not known.
    """

    label: str
    iter: int
    epoch: int
    values: Mapping[str, float]
    best: Sequence[str] = ()
    lr: Sequence[float] = ()
    per_s: float | None = None
    time_s: float | None = None
    eta_s: float | None = None
    memory_mib: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "best", tuple(self.best))
        object.__setattr__(self, "lr", tuple(float("nan") if rate is None else float(rate) for rate in self.lr))

    def as_row(self) -> dict[str, Any]:
        """For a file of JSON lines."""
        return {**asdict(self), "best": list(self.best), "lr": list(self.lr)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Entry:
        """The entry that was written as a row: null was NaN, what is not known is left out.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, AttributeError: if it is no such row.
        """
        known = {item.name: row[item.name] for item in fields(cls) if item.name in row}
        if not isinstance(known["label"], str) or not all(isinstance(name, str) for name in known.get("best", ())):
            raise TypeError("a label and the names of the best values have to be texts")
        for name in known.keys() & {"per_s", "time_s", "eta_s", "memory_mib"}:
            known[name] = None if known[name] is None else number_from_json(known[name])
        known["label"] = showable(known["label"])
        known["iter"], known["epoch"] = int(number_from_json(known["iter"])), int(number_from_json(known["epoch"]))
        known["lr"] = [number_from_json(rate) for rate in known.get("lr", ())]
        known["values"] = {str(name): number_from_json(value) for name, value in row["values"].items()}
        return cls(**known)


def number_from_json(value: Any) -> float:
    """A number that a file holds: null is NaN, infinities are texts.

    Raises:
        TypeError, ValueError: it is none.
    """
    if value is None:
        return float("nan")
    if isinstance(value, bool) or (isinstance(value, str) and value not in ("inf", "-inf")):
        raise TypeError(f"{value!r} is no number")
    return float(value)


@dataclass(frozen=True)
class _Column:
    head: str
    width: int
    kind: str  # "label", "value", "followed", or the name of an attribute of Entry
    title: str
    whole_width: int  # where there is no limit, and names are not shortened

    def text(self, entry: Entry, *, whole: bool = False) -> str:
        """The cell of an entry, in `width` cells; empty if the entry has nothing to say."""
        width = self.whole_width if whole else self.width
        return left(entry.label, width) if self.kind == "label" else right(self._plain(entry), width)

    def header(self, *, whole: bool = False) -> str:
        """The cell above the others."""
        width, title = (self.whole_width, showable(self.head)) if whole else (self.width, self.title)
        return left(title, width) if self.kind == "label" else right(title + " " * (self.kind == "followed"), width)

    def _plain(self, entry: Entry) -> str:
        if self.kind in ("value", "followed"):
            mark = (BEST_MARK if self.head in entry.best else " ") if self.kind == "followed" else ""
            return value_text(entry.values[self.head]) + mark if self.head in entry.values else ""
        if self.kind == "lr":
            return rate_text(entry.lr)
        value = getattr(entry, self.kind)
        if value is None:
            return ""
        if self.kind == "per_s":
            return speed_text(value)
        return f"{value:.0f}M" if self.kind == "memory_mib" else duration(value)


@dataclass
class Table:
    """The lines of a run, with a header before the first, for a new name or another width, and before each 40 lines.

    Args:
        followed: names that decide which weights are best, the most important first.
        unit: what `Entry.per_s` counts.
        label_width: cells of the longest label, if it is known.
        encoding: of the screen: names are written in what it can show.

    >>> table = Table(followed=["eval_acc"])
    >>> values = {"total_loss": 0.5, "eval_acc": 0.75}
    >>> entry = Entry("Epoch 1/2", 9, 0, values, best=["eval_acc"], lr=[0.1], time_s=2.5)
    >>> for line in table.lines(entry, list(values), width=80):
    ...     print(line.text)
    Epoch      total_loss  eval_acc         lr    time
    Epoch 1/2      0.5000    0.7500*       0.1   2.5 s
    """

    followed: Sequence[str] = ()
    unit: str = "samples"
    label_width: int = 0
    encoding: str = "utf-8"
    _columns: list[_Column] = field(default_factory=list)
    _all_columns: list[_Column] = field(default_factory=list)
    _shown: list[str] = field(default_factory=list)  # attributes of Entry that have had a value
    _widths: dict[str, int] = field(default_factory=dict)
    # the only part of a loss, whose value is the total: decided once, so that columns do not come and go
    _is_copy: dict[str, bool] = field(default_factory=dict)
    _below_header: int = 0
    _told_left_out: frozenset[str] = frozenset()

    def lines(self, entry: Entry, names: Sequence[str], width: int) -> list[Line]:
        """The lines to print for an entry: its own, behind a header if one is due.

        Args:
            names: of all values of the run that are known, in the order of their columns, those without a value now too.
            width: cells of the screen.
        """
        is_new = self._lay_out(entry, names, width)
        lines = []
        if is_new or self._below_header >= LINES_BELOW_A_HEADER:
            lines += self._header()
            self._below_header = 0
        self._below_header += 1
        return [*lines, self._line(entry)]

    def left_out(self) -> list[str]:
        """Names for which the screen was too narrow, and that have not been told yet."""
        left_out = {c.head for c in self._all_columns if c not in self._columns and c.kind in ("value", "followed")}
        new = [c.head for c in self._all_columns if c.head in left_out - self._told_left_out]
        self._told_left_out |= left_out
        return new

    # ------------------------------------------------------------ columns

    def _lay_out(self, entry: Entry, names: Sequence[str], width: int) -> bool:
        """Decide the columns; returns whether they have changed."""
        for kind in ("per_s", "time_s", "eta_s", "memory_mib"):
            if getattr(entry, kind) is not None and kind not in self._shown:
                self._shown.append(kind)
        self._grow("lr", max(cells(rate_text(entry.lr)), rates_width(entry.lr)), least=VALUE_WIDTH)
        self._grow("label", cells(entry.label), least=self.label_width)
        before = self._columns, self._all_columns
        self._all_columns = self._every_column(entry, names)
        total = entry.values.get("total_loss")
        for name, value in entry.values.items():
            self._is_copy.setdefault(name, value == total and name != "total_loss")
        self._columns = self._those_that_fit(width)
        return before != (self._columns, self._all_columns)

    def _grow(self, kind: str, width: int, *, least: int) -> None:
        self._widths[kind] = max(self._widths.get(kind, least), width)

    def _every_column(self, entry: Entry, names: Sequence[str]) -> list[_Column]:
        columns = [_column(entry.label.split(" ")[0], self._widths["label"], "label")]
        titles = [shortened(showable(name, self.encoding), _NAME_WIDTH) for name in names]
        for name, title in zip(names, titles, strict=True):
            kind = "followed" if name in self.followed else "value"
            shown = title if titles.count(title) == 1 else showable(name, self.encoding)  # two that look alike
            columns.append(_column(name, VALUE_WIDTH + (kind == "followed"), kind, shown))
        if entry.lr or self._widths["lr"] > VALUE_WIDTH:
            columns.append(_column("lr", self._widths["lr"], "lr"))
        heads = {"per_s": (f"{self.unit}/s", 9), "time_s": ("time", 7), "eta_s": ("ETA", 7), "memory_mib": ("mem", 7)}
        return columns + [_column(*heads[kind], kind) for kind in heads if kind in self._shown]

    def _those_that_fit(self, width: int) -> list[_Column]:
        """The label and the first of the others in any case; then as many as fit, the most important first."""
        first, *others = sorted(self._all_columns, key=self._rank)
        chosen, used = [first], first.width
        for column in others:
            used += len(_GAP) + column.width
            if used < width or len(chosen) == 1:
                chosen.append(column)
            else:
                used -= len(_GAP) + column.width
        return [column for column in self._all_columns if column in chosen]

    def _rank(self, column: _Column) -> int:
        if column.kind == "label":
            return 0
        if column.kind == "followed":
            return 1 + list(self.followed).index(column.head) * 2  # the first metric, the total loss, the next metric
        if column.head == "total_loss" and column.kind == "value":
            return 2
        beside = ("eta_s", "time_s", "lr", "per_s", "value", "memory_mib")
        return 100 + (len(beside) if self._is_copy.get(column.head) else beside.index(column.kind))

    # ------------------------------------------------------------ text

    def _header(self) -> list[Line]:
        text = _joined(column.header() for column in self._columns)
        whole = _joined(column.header(whole=True) for column in self._all_columns)
        return [Line(text, whole, ((0, len(text), "head"),), begins_block=True)]

    def _line(self, entry: Entry) -> Line:
        text, marks = "", []
        for column in self._columns:
            text += (_GAP if text else "") + column.text(entry)
            if column.kind == "followed" and column.head in entry.best:
                marks.append((len(text) - len(column._plain(entry)), len(text), "best"))
        return Line(
            text.rstrip(), _joined(column.text(entry, whole=True) for column in self._all_columns), tuple(marks)
        )


def _column(head: str, least: int, kind: str, title: str | None = None) -> _Column:
    title, room = head if title is None else title, kind == "followed"
    widths = (max(least, cells(text) + room) for text in (title, showable(head)))
    return _Column(head, next(widths), kind, title, next(widths))


def _joined(texts: Any) -> str:
    return _GAP.join(texts).rstrip()
