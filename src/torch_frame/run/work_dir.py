"""The folder of a run: its name, its making, and where its checkpoints are found again."""

from __future__ import annotations

import contextlib
import datetime
import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping

from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import WorkDirError
from torch_frame.run.leftovers import CHECKPOINTS, LOG, Leftovers, holds_a_run
from torch_frame.run.lock import FolderLock

_logger = logging.getLogger(__name__)

# No colons and no blanks: Windows forbids the first, shells split at the second.
_TIME_FORMATS = {
    "time_s": "%Y-%m-%d_%H-%M-%S",
    "time_m": "%Y-%m-%d_%H-%M",
    "time_h": "%Y-%m-%d_%H",
    "time_d": "%Y-%m-%d",
}

_SUFFIX = re.compile(r"(_\d{4}-\d\d-\d\d([_ ]\d\d([-:_]\d\d){0,2})?)?(_\d+)?")
"""What `create_new_dir` puts behind a name, and 1.7's did, with a blank; exp_large and exp_3d are other experiments than exp."""


class WorkDir:
    """Where a run's files go: proposed when the trainer is made, a folder of this run only when training begins.

    Args:
        work_dir: as the user gave it; a later change of the working directory does not matter.
        create_new_dir: what to do if it exists; see `Trainer`.
        strategy: all ranks have rank 0's path, whatever their clocks and working directories are.

    Attributes:
        path: absolute; final once `claim` or `enter` has been called.
        own: "ckpt_dir", "log_file" -> what gives its path, if a subclass of the script's has places of its own, as in 1.7.
    """

    def __init__(self, work_dir: str | os.PathLike[str], create_new_dir: str | None, strategy: Strategy) -> None:
        self.own: Mapping[str, Callable[[], str]] = {}
        self._given = os.path.abspath(_clean(work_dir))
        self.path: str = strategy.broadcast(get_workspace(self._given, create_new_dir))
        self._create_new_dir = create_new_dir
        self._claimed = False
        self._begun = False  # a run of this trainer's is in it
        self._lock: FolderLock | None = None
        self._leftovers = Leftovers(self.path)

    @property
    def default_checkpoints(self) -> str:
        """The folder of the checkpoints, if a subclass has none of its own."""
        return os.path.join(self.path, CHECKPOINTS)

    @property
    def default_log(self) -> str:
        """The run's log, if a subclass has none of its own."""
        return os.path.join(self.path, LOG)

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints."""
        return os.path.abspath(self.own.get("ckpt_dir", lambda: self.default_checkpoints)())

    @property
    def checkpoints_name(self) -> str:
        """That folder, seen from the run's; elsewhere its path."""
        name = os.path.relpath(self.checkpoints, self.path) if "ckpt_dir" in self.own else CHECKPOINTS
        return self.checkpoints if name.startswith(os.pardir) else name

    @property
    def tb_logs(self) -> str:
        """The folder of TensorBoard's files."""
        return os.path.join(self.path, "tb_logs")

    @property
    def log(self) -> str:
        """The run's log."""
        return os.path.abspath(self.own.get("log_file", lambda: self.default_log)())

    def claim(self, strategy: Strategy) -> None:
        """Make the folder; under another name if another run has taken the proposed one in the meantime.

        Rank 0 makes it, and all ranks have the same one.

        Raises:
            WorkDirError: if it cannot be made; on all ranks.
        """
        if not self._claimed:
            self._on_rank_0(strategy, self._make)
            self._claimed = True  # on all ranks: rank 0 may save weights alone later

    def enter(self, strategy: Strategy, *, anew: bool) -> list[str]:
        """Training begins: make the folder, keep other processes out of it, and make the folder of the checkpoints.

        Args:
            strategy: rank 0 does it.
            anew: the run is not resumed, so the files of another run are put aside.

        Returns:
            What is to be said, on rank 0.

        Raises:
            WorkDirError: if the folder cannot be made or written, or another run trains in it; on all ranks.
        """
        told: list[str] = []
        self._on_rank_0(strategy, lambda: self._enter(anew, told))
        self._claimed = True
        return told

    def leave(self) -> None:
        """Training has ended: other processes may train in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextlib.contextmanager
    def left_on_error(self) -> Iterator[None]:
        """If what is inside fails, training does not begin."""
        try:
            yield
        except BaseException:
            self.leave()
            raise

    @contextlib.contextmanager
    def left_at_end(self) -> Iterator[None]:
        """Training goes on inside."""
        try:
            yield
        finally:
            self.leave()

    def renew(self) -> None:
        """At a save: the folder is still this run's."""
        if self._lock is not None:
            self._lock.renew()

    def find(self, checkpoint: str | os.PathLike[str]) -> str:
        """The checkpoint's place: as given, in this work dir, or in the newest sibling."""
        return find_checkpoint(os.fspath(checkpoint), self._given, self.checkpoints_name)

    def candidates(self) -> list[str]:
        """The folders in which a run of this work dir may be: it, and those that `create_new_dir` makes beside it."""
        return [self._given, *_siblings(self._given)]

    def to_look_in(self) -> tuple[list[str], Callable[[str], bool], str]:
        """The candidates, what takes one of them, and where in it the checkpoints are."""
        return self.candidates(), self.take, self.checkpoints_name

    def take(self, folder: str) -> bool:
        """Keep other processes out of one of the candidates; False if another run trains there, or it cannot be written."""
        self.leave()
        with contextlib.suppress(WorkDirError):
            self._lock = FolderLock.if_free(folder)
        return self._lock is not None

    def move_to(self, checkpoint_path: str) -> None:
        """Continue in the work dir that holds this checkpoint, known from the file's own place."""
        folder = os.path.dirname(os.path.abspath(checkpoint_path))
        name = self.checkpoints_name
        if folder.endswith(os.sep + name):
            self.path = folder.removesuffix(os.sep + name)
            self._create_new_dir = None
            self._claimed = False

    # ---------------------------------------------------------------- on rank 0

    def _on_rank_0(self, strategy: Strategy, work: Callable[[], None]) -> None:
        error: OSError | None = None
        if strategy.rank == 0:
            try:
                work()
            except OSError as problem:
                error = problem
        self.path, problem_of_rank_0 = strategy.broadcast((self.path, None if error is None else str(error)))
        if error is not None:
            raise error
        if problem_of_rank_0 is not None:
            raise WorkDirError(problem_of_rank_0)

    def _make(self) -> None:
        if not self._claimed:
            self.path = next(iter(self._usable()))
            self._claimed = True

    def _enter(self, anew: bool, told: list[str]) -> None:
        if self._lock is not None and self._lock.folder != self.path:  # of a search that has found nothing
            self.leave()
        if self._lock is None:
            self._make_and_lock()
        self._claimed = True
        with _in_words(self.path):
            os.makedirs(os.path.dirname(self.checkpoints), exist_ok=True)
            _use(self.checkpoints, "The folder")
        if anew and not self._begun and self._create_new_dir is None and self._leftovers.folder == self.path:
            aside = self._leftovers.put_aside()
            if aside:
                told.append(f"{self.path} holds files of another run, which are put aside: {', '.join(aside)}.")
        self._begun = True

    def _make_and_lock(self) -> None:
        if self._claimed or self._create_new_dir is None:
            self._make()
            self._lock = FolderLock(self.path)
            return
        for path in self._usable():
            lock = FolderLock.if_free(path)
            if lock is not None and holds_a_run(path):  # of a run that has begun and ended just now
                lock.release()
            elif lock is not None:
                self.path, self._lock = path, lock
                return

    def _usable(self) -> Iterator[str]:
        """Folders that this run may use, best first; each is made when it is asked for.

        The one that was proposed may be there by now: the script has made it, to put its config there.
        """
        with _in_words(self._given):
            if self._create_new_dir is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                yield _use(self.path)
                return
            os.makedirs(os.path.dirname(self._given), exist_ok=True)
            if _make(self.path) or (os.path.isdir(self.path) and not holds_a_run(self.path)):
                yield self.path
            yield from (path for path in _candidates(self._given, self._create_new_dir) if _make(path))


@contextlib.contextmanager
def _in_words(work_dir: str) -> Iterator[None]:
    """What the system says of a folder that cannot be made is told with its name."""
    try:
        yield
    except WorkDirError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise WorkDirError(f"work_dir {work_dir!r} can't be made: {reason} ({error.filename}). {_ADVICE}") from error


def _clean(work_dir: str | os.PathLike[str]) -> str:
    """Expands `~` and strips trailing separators, so that a suffix makes a sibling and not a child."""
    path = os.path.expanduser(os.fspath(work_dir))
    if not path:
        raise ValueError("work_dir is empty. Name a folder, for example 'work_dir'.")
    path = path.rstrip(os.sep + (os.altsep or "")) or os.sep
    # '.' and '..' have no name of their own that a suffix could be put to.
    return os.path.abspath(path) if os.path.basename(path) in ("", ".", "..") else path


def _candidates(work_dir: str, create_new_dir: str | None) -> Iterator[str]:
    """The names to try, best first."""
    yield work_dir
    if create_new_dir is None:
        return
    if create_new_dir != "count":
        work_dir += datetime.datetime.now().strftime(f"_{_TIME_FORMATS[create_new_dir]}")
        yield work_dir
    first = 0 if create_new_dir == "count" else 1
    yield from (f"{work_dir}_{number}" for number in itertools.count(first))


def _check_mode(create_new_dir: str | None) -> None:
    modes = (None, *_TIME_FORMATS, "count")
    if create_new_dir not in modes:
        listed = ", ".join(repr(mode) for mode in modes)
        raise ValueError(f"create_new_dir is {create_new_dir!r}, but must be one of {listed}.")


def get_workspace(work_dir: str | os.PathLike[str], create_new_dir: str | None) -> str:
    """Proposes a folder for a run, and makes nothing; `claim_work_dir` makes it.

    Args:
        work_dir: the folder that the user named. It is the answer if it does not exist yet.
        create_new_dir: what is put behind the name of a folder that exists: the time down to the second, minute, hour
            or day (`"time_s"`, `"time_m"`, `"time_h"`, `"time_d"`), a number (`"count"`), or nothing (None: the folder
            is used again).

    Returns:
        A path that does not exist yet (with None: `work_dir`).

    Raises:
        ValueError: another `create_new_dir`, or an empty `work_dir`.

    >>> get_workspace("a_folder_that_is_not_there/", "time_s")
    'a_folder_that_is_not_there'
    """
    _check_mode(create_new_dir)
    work_dir = _clean(work_dir)
    if create_new_dir is None:
        return work_dir
    return next(path for path in _candidates(work_dir, create_new_dir) if not os.path.lexists(path))


def claim_work_dir(work_dir: str | os.PathLike[str], create_new_dir: str | None) -> str:
    """Makes the folder of a run. Of two runs that start at the same moment each gets a folder of its own.

    Args:
        work_dir: as in `get_workspace`.
        create_new_dir: as in `get_workspace`; with None an existing folder is used.

    Returns:
        The path of the folder.

    Raises:
        ValueError: as in `get_workspace`.
        WorkDirError: the folder can't be made or written to.

    >>> import tempfile
    >>> folder = os.path.join(tempfile.mkdtemp(), "run")
    >>> [os.path.basename(claim_work_dir(folder, "count")) for _ in range(3)]
    ['run', 'run_0', 'run_1']
    """
    _check_mode(create_new_dir)
    work_dir = _clean(work_dir)
    with _in_words(work_dir):
        os.makedirs(os.path.dirname(work_dir) or ".", exist_ok=True)
        if create_new_dir is None:
            return _use(work_dir)
        return next(path for path in _candidates(work_dir, create_new_dir) if _make(path))


_ADVICE = "Choose a work_dir in a folder that you may write to."


def _make(path: str) -> bool:
    """Makes a folder; False if the name is taken, by another process perhaps."""
    try:
        os.mkdir(path)
    except FileExistsError:
        return False
    except UnicodeEncodeError as error:
        raise WorkDirError(
            f"work_dir {path!a} has characters that this system's file names cannot hold ({error.encoding}). "
            "Set a UTF-8 locale (export LC_ALL=C.UTF-8, or PYTHONUTF8=1), or choose another work_dir."
        ) from error
    return True


def _use(path: str, name: str = "work_dir") -> str:
    if os.path.islink(path) and not os.path.exists(path):
        raise WorkDirError(
            f"{name} {path!r} is a link to {os.readlink(path)!r}, which is not there. Make that folder, or remove the link."
        )
    if not _make(path) and not os.path.isdir(path):
        raise WorkDirError(f"{name} {path!r} is a file, not a folder. Remove it, or choose another work_dir.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise WorkDirError(f"{name} {path!r} is a folder that you may not write to. {_ADVICE}")
    return path


def _siblings(work_dir: str) -> list[str]:
    """The folders that `create_new_dir` has made beside a work dir."""
    found = glob.glob(f"{glob.escape(work_dir)}_[0-9]*")
    return sorted(path for path in found if _SUFFIX.fullmatch(path[len(work_dir) :]))


def _modified_s(path: str) -> float:
    """Time of the last change; a file that is not there (or went away just now) is older than all."""
    try:
        return os.path.getmtime(path)
    except OSError:
        return float("-inf")


def _newest(paths: list[str]) -> str | None:
    files = [path for path in paths if os.path.isfile(path)]
    return max(files, key=lambda path: (_modified_s(path), path), default=None)


def find_checkpoint(name: str | os.PathLike[str], work_dir: str | os.PathLike[str], folder: str = CHECKPOINTS) -> str:
    """Finds a checkpoint: as given, then in `work_dir/checkpoints`, then in the newest sibling `work_dir_*`.

    The newest sibling is the one whose `checkpoints/name` was changed last. A warning says so if such a file is newer
    than the one found.

    Args:
        name: a path, or the name of a file as `"latest.pth"`.
        work_dir: the folder that the user named, without a suffix.
        folder: of the checkpoints, seen from a work dir.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: it is in none of these places; the message lists them.
    """
    name = os.path.expanduser(os.fspath(name))
    work_dir = _clean(work_dir)
    if os.path.isabs(name):
        places, siblings = [name], []
    else:
        places = [name, os.path.join(work_dir, folder, name)]
        siblings = [os.path.join(sibling, folder, name) for sibling in _siblings(work_dir)]
    newest_sibling = _newest(siblings)
    found = next((place for place in places if os.path.isfile(place)), newest_sibling)
    if found is None:
        looked_at = "\n  ".join(places + siblings)
        raise FileNotFoundError(f"There is no checkpoint {name!r}. Looked at:\n  {looked_at}\nGive the file's path.")
    if newest_sibling is not None and _modified_s(newest_sibling) > _modified_s(found):
        _logger.warning("Taking %s, but %s is newer. Give its path if you meant that one.", found, newest_sibling)
    return found
