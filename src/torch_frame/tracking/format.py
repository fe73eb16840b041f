"""Numbers and times as people read them, in cells of a fixed width."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence

VALUE_WIDTH = 8
"""Cells of a value, a rate or a time."""


def value_text(value: float, width: int = VALUE_WIDTH) -> str:
    """A value with four decimals, or as many as fit; very small and very large ones as a power of ten.

    >>> [value_text(value) for value in (0.91234, 12.5, 123456.7, 1.5e-07, -1234.5, float("nan"))]
    ['0.9123', '12.5000', '123456.7', '1.50e-07', '-1234.50', 'nan']
    """
    if not math.isfinite(value):
        return str(float(value))
    forms = [".4f", ".3f", ".2f", ".1f", ".0f"] if value == 0 or 5e-4 <= abs(value) < 1e7 else []
    texts = (f"{value:{form}}" for form in [*forms, ".2e", ".1e", ".0e"])
    return next((text for text in texts if len(text) <= width), f"{value:.0e}")


def rate_text(rates: Sequence[float]) -> str:
    """The learning rates of an optimizer's groups: one if they are equal, up to three, else the smallest and the largest.

    >>> rate_text([0.003]), rate_text([0.1, 0.01, 0.1]), rate_text([0.1, 0.2, 0.3, 0.4])
    ('0.003', '0.1/0.01', '0.1..0.4')
    """
    different = list(dict.fromkeys(f"{rate:.3g}" for rate in rates))
    if len(different) > 3:
        return f"{min(rates):.3g}..{max(rates):.3g}"
    return "/".join(different)


def rates_width(rates: Sequence[float]) -> int:
    """Cells that `rate_text` takes at most for so many different rates.

    >>> rates_width([0.003]), rates_width([0.1, 0.01]), rates_width([0.1, 0.2, 0.3, 0.4])
    (8, 17, 18)
    """
    different = len(set(rates))
    return VALUE_WIDTH * different + max(different - 1, 0) if different <= 3 else 2 * VALUE_WIDTH + 2


def speed_text(per_s: float) -> str:
    """A number of things a second.

    >>> speed_text(12345.6), speed_text(3.14159), speed_text(0.0123)
    ('12,346', '3.1', '0.012')
    """
    if not math.isfinite(per_s):
        return ""
    if per_s >= 100:
        return f"{per_s:,.0f}" if per_s < 1e6 else f"{per_s:.2e}"
    return f"{per_s:.1f}" if per_s >= 1 else f"{per_s:.2g}"


def duration(seconds: float) -> str:
    """A time in seconds as text of at most seven cells.

    >>> [duration(seconds) for seconds in (0.42, 59.96, 725, 3725, 45296, 90061, 1e7)]
    ['0.4 s', '1:00', '12:05', '1:02:05', '12h 34m', '1d 1h', '115d']
    """
    if not math.isfinite(seconds):
        return ""
    seconds = max(seconds, 0.0)
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes}:{rest:02}"
    if hours < 24:
        return f"{hours}:{minutes:02}:{rest:02}" if hours < 10 else f"{hours}h {minutes:02}m"
    days, hours = divmod(hours, 24)
    if days < 100:
        return f"{days}d {hours}h"
    return f"{days}d" if days < 10**6 else f"{days:.0e}d"


def size_text(num_bytes: float) -> str:
    """A size of memory or of a file.

    >>> size_text(164), size_text(40_000), size_text(3e8), size_text(2e10)
    ('164 bytes', '39.1 KiB', '286.1 MiB', '18.6 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def counted(number: int, one: str, several: str = "") -> str:
    """A number of things.

    >>> counted(1, "epoch"), counted(1200, "epoch"), counted(2, "batch", "batches")
    ('1 epoch', '1,200 epochs', '2 batches')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def ago(seconds: float) -> str:
    """How long something is past, roughly.

    >>> ago(12.3), ago(200), ago(7200), ago(200000)
    ('12 s ago', '3 min ago', '2 h ago', '2 days ago')
    """
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{max(seconds, 0.0):.0f} s ago"


def shares(seconds: Mapping[str, float]) -> str:
    """Parts of a time, the largest first.

    >>> shares({"data": 1.0, "steps": 8.0, "other": 1.0})
    'steps 80 %, data 10 %, other 10 %'
    """
    total = sum(seconds.values())
    largest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share / total:.0%}".replace("%", " %") for name, share in largest_first) if total else ""


# ---------------------------------------------------------------- cells


def cells(text: str) -> int:
    r"""How many cells of a terminal a text takes: Chinese characters take two, accents and joiners none.

    >>> cells("acc"), cells("准确率"), cells("e\u0301"), cells("\u200b")
    (3, 6, 1, 0)
    """
    return len(text) if text.isascii() else sum(map(_cells_of_one, text))


def _cells_of_one(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def showable(text: str, encoding: str = "utf-8") -> str:
    r"""The text as a screen of this encoding can show it: control characters, and what the encoding lacks, as escapes.

    >>> print(showable("a\nb"), showable("准", "ascii"))
    a\nb \u51c6
    """
    if not text.isprintable():
        hidden = ("Cc", "Cs", "Zl", "Zp")
        escaped = (
            one.encode("unicode_escape").decode() if unicodedata.category(one) in hidden else one for one in text
        )
        text = "".join(escaped)
    try:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except (LookupError, ValueError):  # no encoding that is known here
        return text


def right(text: str, width: int) -> str:
    """The text at the right of `width` cells."""
    return " " * (width - cells(text)) + text


def left(text: str, width: int) -> str:
    """The text at the left of `width` cells."""
    return text + " " * (width - cells(text))


def shortened(name: str, width: int) -> str:
    """A name in at most `width` cells, without its middle.

    >>> shortened("validation_mean_average_precision", 16)
    'validat..ecision'
    """
    if cells(name) <= width:
        return name
    keep = width - 2
    head, tail = _first_cells(name, keep - keep // 2), _first_cells(name[::-1], keep // 2)[::-1]
    return f"{head}..{tail}"


def _first_cells(text: str, width: int) -> str:
    while cells(text) > width:
        text = text[:-1]
    return text


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` cells, broken at spaces; a word that is longer stays whole, as paths do."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cells(lines[-1]) + 1 + cells(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def aligned(rows: Mapping[str, str], width: int, *, unbroken: Sequence[str] = ()) -> list[str]:
    """Names at the left and their texts beside them; a text of several lines, or too long a one, continues below itself.

    Args:
        rows: name -> text.
        width: cells of the screen.
        unbroken: names of rows whose lines stay whole however long: commands, which people copy.

    >>> aligned({"model": "Net", "data": "600 samples"}, 80)
    ['  model  Net', '  data   600 samples']
    """
    of_names = max(map(cells, rows), default=0)
    lines = []
    for name, text in rows.items():
        room = max(width - of_names - 5, 20)
        parts = [part for line in text.split("\n") for part in ([line] if name in unbroken else wrapped(line, room))]
        lines += [f"  {left(name if index == 0 else '', of_names)}  {part}" for index, part in enumerate(parts)]
    return lines
