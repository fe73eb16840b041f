"""A line of the log that looks different on a screen and in a file."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_ATTRIBUTE = "torch_frame_line"


@dataclass(frozen=True)
class Line:
    """A line for every handler of a logger.

    Attributes:
        text: what fits the screen, for handlers that know nothing else.
        whole: what a file gets, without a limit to its width; None: `text`.
        marks: (first character, one behind the last, style) of parts of `text`: "best" or "head".
        begins_block: on a screen an empty line stands above it.
    """

    text: str
    whole: str | None = None
    marks: tuple[tuple[int, int, str], ...] = ()
    begins_block: bool = False

    def log(self, logger: logging.Logger, level: int = logging.INFO) -> None:
        """Hand it to a logger."""
        logger.log(level, "%s", self.text, extra={_ATTRIBUTE: self})

    @classmethod
    def title(cls, text: str) -> Line:
        """The first line of a block."""
        return cls(text, marks=((0, len(text), "head"),), begins_block=True)

    def on_screen(self, styles: dict[str, str] | None = None, reset: str = "") -> str:
        """The text as a screen shows it.

        Args:
            styles: escape codes to stand in front of the marks; None: no colours.
            reset: the code behind a mark.

        >>> Line("acc 0.9*", marks=((4, 8, "best"),)).on_screen({"best": "<green>"}, "</>")
        'acc <green>0.9*</>'
        """
        text = self.text
        if styles is None:
            return "\n" + text if self.begins_block else text
        for start, end, style in sorted(self.marks, reverse=True):
            text = f"{text[:start]}{styles[style]}{text[start:end]}{reset}{text[end:]}"
        return "\n" + text if self.begins_block else text


def line_of(record: logging.LogRecord) -> Line | None:
    """The line that a record was made of; None for all other records."""
    line = getattr(record, _ATTRIBUTE, None)
    return line if isinstance(line, Line) else None
