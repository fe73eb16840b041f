"""Where a run continues: the file that `resume=` and `load_checkpoint` mean, and what is said about it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from torch_frame._version import __version__
from torch_frame.checkpoint import io
from torch_frame.checkpoint.format import VERSION, is_full_state
from torch_frame.checkpoint.names import bare_name
from torch_frame.checkpoint.upgrade import OLDEST, upgraded
from torch_frame.checkpoint.values import decode
from torch_frame.checkpoint.weights import WeightsReport, load_weights
from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import CheckpointError
from torch_frame.progress import Progress
from torch_frame.run.parts import ENVIRONMENT
from torch_frame.run.settings import SettingsPart
from torch_frame.run.state import Part, Restored, State, restore, restore_last
from torch_frame.run.trained import FrozenParameters
from torch_frame.training.buffers import prepare_to_load
from torch_frame.training.ema import EMA
from torch_frame.training.schedule_free import holds_training

_logger = logging.getLogger("torch_frame")
_NEWER_PARTS = {"attributes": None, "modes": None, "settings": None}
"""What the first states of version 2 do not have."""


@dataclass(frozen=True)
class Found:
    """A whole state that a run can continue from.

    Attributes:
        path: of its file.
        state: what the file holds.
        problems: what was wrong with newer files.
    """

    path: str
    state: State
    problems: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, path: str) -> Self:
        """What the file holds."""
        return cls(path, read(path))


def read(path: str) -> State:
    """Read a whole state, in today's format.

    Raises:
        CheckpointError: if the file is damaged, or holds weights only.
    """
    state: Any = io.read(path)
    if not is_full_state(state):
        raise CheckpointError(
            f"{path} holds weights, not a training state to resume from. "
            f"For the weights alone: trainer.load_checkpoint(checkpoint=torch.load({path!r}))."
        )
    if not OLDEST <= state["version"] <= VERSION:
        raise CheckpointError(
            f"{path} has format {state['version']}, and this torch-frame {__version__} reads formats {OLDEST} to {VERSION}. "
            f"It was written by torch-frame {state.get('torch_frame')}: resume it with that version."
        )
    return {**_NEWER_PARTS, **upgraded(state)}


def newest(work_dirs: Sequence[str], take: Callable[[str], bool], folder: str = "checkpoints") -> Found | None:
    """The newest whole state in some work dirs, or None if there is none. No other run trains in its work dir.

    Args:
        work_dirs: where to look.
        take: keeps other processes out of a work dir; False if one trains there.
        folder: of the checkpoints, seen from a work dir.

    Raises:
        CheckpointError: if there are states, and all are damaged: beginning anew would overwrite them.
    """
    problems: list[str] = []
    in_use: dict[str, str] = {}
    for work_dir, path in _newest_first(work_dirs, folder):
        if work_dir in in_use or not take(work_dir):
            in_use[work_dir] = (
                f"{work_dir} is left alone, because another process trains there or it cannot be written."
            )
            continue
        try:
            return Found(path, read(path), [*problems, *in_use.values()])
        except FileNotFoundError:
            if os.path.islink(path):
                problems.append(f"{path} is a link to {os.readlink(path)!r}, which is not there.")
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(
            f"resume='auto' finds no whole state in {work_dirs[0]} or beside it: {' '.join(problems)} To begin anew, move them "
            "away; to begin from weights alone (best.pth), use load_checkpoint(checkpoint=...)."
        )
    for line in in_use.values():
        _logger.warning("resume='auto': %s", line)
    return None


def _newest_first(work_dirs: Sequence[str], folder: str) -> list[tuple[str, str]]:
    """(work dir, path) of the files of whole states, by their last change; in a folder `latest.pth` first, for a copy has new
    times."""
    found: list[tuple[float, int, str, str]] = []
    for work_dir in work_dirs:
        limit = math.inf
        for turn, name in enumerate(("latest.pth", "previous.pth")):
            path = os.path.join(work_dir, folder, name)
            if _modified_s(path):
                times = [*_modified_s(path), *_modified_s(os.path.join(work_dir, folder, "previous.pth"))]
                limit = min(limit, max(times) if turn == 0 else times[0])
                found.append((-limit, turn, path, work_dir))
    return [(work_dir, path) for _, _, path, work_dir in sorted(found)]


def _modified_s(path: str) -> list[float]:
    """Of a file, or a link that leads nowhere; nothing of anything else."""
    if os.path.isfile(path):
        return [os.path.getmtime(path)]
    return [os.lstat(path).st_mtime] if os.path.islink(path) and not os.path.exists(path) else []


def load_best(folder: str, models: Sequence[nn.Module], strategy: Strategy) -> WeightsReport:
    """Load the best weights of a run into models of one kind, on all ranks; rank 0 reads them.

    Args:
        folder: of the checkpoints; complete.

    Raises:
        FileNotFoundError: if there is no best.pth; on all ranks.
        CheckpointError: if it is damaged, or does not fit; on all ranks.
    """
    path = os.path.join(folder, "best.pth")
    weights, problem = None, None
    if strategy.rank == 0:
        try:
            weights = io.read(path)
        except FileNotFoundError:
            problem = "none", f"There is no {path}: no hook that saves has found a best epoch yet."
        except CheckpointError as error:
            problem = "damaged", str(error)
    weights, problem = strategy.broadcast((weights, problem))
    if problem is not None:
        raise FileNotFoundError(problem[1]) if problem[0] == "none" else CheckpointError(problem[1])
    reports = [load_weights(model, weights) for model in models]
    _logger.info("Loaded %s: %s.", path, reports[0])
    return reports[0]


class Resumption:
    """Whether and where a run continues, and what is still to be restored and told.

    Args:
        asked: the value of `resume=`.

    Attributes:
        told: (level, line) of what has happened before there was a log.
    """

    def __init__(self, asked: str | os.PathLike[str] | None) -> None:
        self.told: list[tuple[int, str]] = []
        self._asked = asked
        self._restored: Restored | None = None

    @property
    def asked(self) -> str | os.PathLike[str] | None:
        """The value of `resume=`; None if a state has been loaded, or there was none to begin with."""
        return self._asked

    def begin_anew(self) -> None:
        """There is no state to continue from."""
        self._asked = None

    def restore(self, found: Found, parts: Mapping[str, Part], progress: Progress) -> None:
        """Restore all that is not restored last.

        Raises:
            CheckpointError: if the state does not fit; nothing is changed then.
        """
        self._restored = restored = restore(parts, found.state)
        self._asked = None
        settings = parts["settings"]
        assert isinstance(settings, SettingsPart)
        self.told += _lines(found, progress, settings.told(), parts["environment"].state_dict())
        self.told += restored.lines

    def restore_last(self, parts: Callable[[], Mapping[str, Part]]) -> None:
        """Restore the rest, as the last thing before the first batch; `parts` gives the table."""
        if self._restored is not None:
            for level, line in restore_last(parts(), self._restored):
                _logger.log(level, line)
            self._restored = None

    def load_weights(
        self, checkpoint: Mapping[str, Any], model: nn.Module, ema: EMA | None, frozen: FrozenParameters
    ) -> WeightsReport:
        """Begin with given weights, or with those of a whole state: what fits is loaded, and EMA begins anew from it."""
        weights = checkpoint["model"] if is_full_state(checkpoint) else checkpoint
        prepare_to_load(model, weights)
        report = load_weights(model, weights)
        if ema is not None:
            ema.reset(model)
        unexpected = report.unexpected_keys or report.mismatched_shapes
        if unexpected or any(bare_name(name) not in frozen for name in report.missing_keys):
            _logger.warning("The weights fit in part: %s", report)
        frozen.begin_anew()
        self.told.append((logging.INFO, f"Loaded weights only: {report}."))
        if is_full_state(checkpoint) and holds_training(decode(checkpoint.get("optimizers", {}))):
            self.told.append(
                (
                    logging.WARNING,
                    "The weights are of a state of a schedule-free optimizer, which holds those of training. best.pth and "
                    "epoch_N.pth hold the averaged ones, which are to be used.",
                )
            )
        return report


def _lines(found: Found, progress: Progress, settings: list[str], now: Mapping[str, Any]) -> list[tuple[int, str]]:
    """What is said of a resumed run: (level, line).

    Args:
        settings: sentences about those of the optimizer and the schedule.
        now: the environment of this process, and the run's other settings.
    """
    place = f"epoch {progress.epoch + 1}, after {progress.inner_iter} of its batches"
    counts = f"{progress.iter} iterations and {progress.num_updates} updates in all"
    said = [(logging.WARNING, f"Not resumed from: {problem}") for problem in found.problems]
    said.append((logging.INFO, f"Resumed from {found.path}: {place}; {counts}."))
    was = found.state["environment"] or {}
    steps = _differences(was, {name: value for name, value in now.items() if name not in ENVIRONMENT})
    around = _differences(was, {name: value for name, value in now.items() if name in ENVIRONMENT})
    sentences = list(settings)
    sizes = _samples_an_update(was), _samples_an_update(now)
    if was.get("world_size", now["world_size"]) != now["world_size"] and None not in sizes and sizes[0] != sizes[1]:
        sentences.append(
            f"An update is made of {sizes[1]} samples, and was of {sizes[0]}: batch_size is for each rank, and there are "
            f"{now['world_size']} instead of {was['world_size']}."
        )
    if steps:
        sentences.append(f"Continued with the script's settings: {'; '.join(steps)}.")
    if around:
        sentences.append(
            "The run continues, but its last bits may differ from those of the uninterrupted run, because "
            f"{'; '.join(around)}."
        )
    if sentences:
        said.append((logging.WARNING, " ".join(sentences)))
    return said


def _samples_an_update(environment: Mapping[str, Any]) -> int | None:
    names = ("batch_size", "gradient_accumulation_steps", "world_size")
    factors = [factor for name in names if isinstance(factor := environment.get(name), int)]
    return math.prod(factors) if len(factors) == len(names) else None


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    both = [name for name in now if name in was]
    return [f"{name} was {was[name]}, now it is {now[name]}" for name in both if was[name] != now[name]]
