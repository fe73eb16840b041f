"""What another run has left in a folder, and how a run that begins anew there puts it aside."""

from __future__ import annotations

import glob
import itertools
import os

from torch_frame.errors import WorkDirError

LOG = "log.txt"
CHECKPOINTS = "checkpoints"
_PLACES = ("metrics.jsonl", "tb_logs", CHECKPOINTS, "run.json", "table.jsonl")


def holds_a_run(folder: str) -> bool:
    """Whether a run has left its files in a folder; a script's own files, beside them, do not count."""
    files = [os.path.join(folder, name) for name in (LOG, "metrics.jsonl")]
    checkpoints = glob.glob(os.path.join(glob.escape(folder), CHECKPOINTS, "*.pth"))
    return bool(checkpoints) or any(os.path.lexists(file) for file in files)


class Leftovers:
    """What was in a folder at one moment.

    Args:
        folder: of a run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._names = {place: _names_in(os.path.join(folder, place)) for place in _PLACES}
        self._log = self._mark_of_log()

    def put_aside(self) -> list[str]:
        """Rename what was there then: `metrics.1.jsonl`, `tb_logs.1`, `checkpoints.1`; if a run has been there since, all.

        Returns:
            The new names.

        Raises:
            WorkDirError: if something cannot be renamed.
        """
        names = self._names
        if self._mark_of_log() != self._log:
            names = {place: _names_in(os.path.join(self.folder, place)) for place in _PLACES}
        places = [place for place in _PLACES if names[place] & _names_in(os.path.join(self.folder, place))]
        number = next(n for n in itertools.count(1) if not any(os.path.lexists(self._numbered(p, n)) for p in _PLACES))
        try:
            return [self._moved(place, names[place], number) for place in places]
        except OSError as error:
            raise WorkDirError(
                f"The files of another run in {self.folder!r} cannot be put aside: {error}. Move them away, or choose another "
                "work_dir."
            ) from error

    def _moved(self, place: str, names: set[str], number: int) -> str:
        """Rename a file, or a folder's files; a link stays, and what it points to is renamed."""
        path = os.path.realpath(os.path.join(self.folder, place))
        aside = (
            self._numbered(place, number)
            if not os.path.islink(os.path.join(self.folder, place))
            else (_with_number(path, number))
        )
        if not os.path.isdir(path):
            os.rename(path, aside)
            return os.path.basename(aside)
        os.mkdir(aside)
        for name in sorted(names & _names_in(path)):
            os.rename(os.path.join(path, name), os.path.join(aside, name))
        return os.path.basename(aside)

    def _numbered(self, place: str, number: int) -> str:
        return _with_number(os.path.join(self.folder, place), number)

    def _mark_of_log(self) -> tuple[int, int] | None:
        try:
            status = os.stat(os.path.join(self.folder, LOG))
        except OSError:
            return None
        return status.st_size, status.st_mtime_ns


def _with_number(path: str, number: int) -> str:
    stem, extension = os.path.splitext(path)
    return f"{stem}.{number}{extension}"


def _names_in(path: str) -> set[str]:
    """What a folder holds, without half-written files; of a file its own name, unless it is empty or a device."""
    if os.path.isdir(path):
        return {name for name in os.listdir(path) if not name.endswith(".tmp")}
    return {os.path.basename(path)} if os.path.isfile(path) and os.path.getsize(path) else set()
