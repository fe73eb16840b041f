"""Which parameters are trained, and which never were."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.checkpoint.names import bare_name
from torch_frame.run.by_name import Names
from torch_frame.run.optimizers import some
from torch_frame.run.state import Line
from torch_frame.training.ema import EMA

_logger = logging.getLogger("torch_frame")
_NUM_SAMPLES = 64


class RequiresGradPart:
    """Which parameters are trained: `requires_grad` of the model's and of the optimizers' others, by name.

    Args:
        model: the bare model.
    """

    def __init__(self, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self._parameters: dict[str, Tensor] = {bare_name(name): parameter for name, parameter in named}
        for label, optimizer in optimizers.items():
            self._parameters |= Names(model, optimizer, label).outside

    def state_dict(self) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in self._parameters.items()}

    def load_state_dict(self, saved: Mapping[str, bool] | None) -> None:
        for name in self._differing(saved):
            self._parameters[name].requires_grad_((saved or {})[name])

    def lines(self, saved: Mapping[str, bool] | None) -> list[Line]:
        """What to say when it is restored."""
        differing = self._differing(saved)
        said: list[Line] = []
        for trained, word in ((True, "trained"), (False, "frozen")):
            names = [name for name in differing if (saved or {})[name] is trained]
            if names:
                other = "frozen" if trained else "trained"
                are, them = ("is", "it") if len(names) == 1 else ("are", "them")
                text = f"{some(names)} {are} {word}, as saved; the script had {them} {other}."
                said.append((logging.WARNING, text))
        return said

    def keep(self) -> Callable[[], None]:
        flags = [(parameter, parameter.requires_grad) for parameter in self._parameters.values()]

        def put_back() -> None:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

        return put_back

    def _differing(self, saved: Mapping[str, bool] | None) -> list[str]:
        own = self._parameters
        return [name for name, flag in (saved or {}).items() if name in own and own[name].requires_grad is not flag]


class _Mark(NamedTuple):
    """How a parameter stood when the run began, to see whether it has been written to."""

    version: int
    sample: Tensor


class FrozenParameters:
    """The parameters that this run has never trained; with `save_frozen=False` no file holds them.

    A parameter is trained from the first look on that finds `requires_grad`, or another value than it had when the run began: a
    momentum encoder is frozen, and still changes. Looked at when the run begins, at each epoch's begin, and at each save (values
    too: torch's count of writes, and up to 64 elements). What has been trained once stays in the files. Buffers are always saved.

    As a part it is a digest of each of them, taken when the run begins; they are compared when a run is resumed.

    Args:
        model: the bare model.
        ema: shares them.
        left_out: whether they are left out of the files; False: all is saved.
    """

    def __init__(self, model: nn.Module, ema: EMA | None, left_out: bool) -> None:
        self._model = model
        self._ema = ema
        self._left_out = left_out
        self._in_file: Collection[str] = ()
        self.begin_anew()

    def begin_anew(self) -> None:
        """All that is frozen now has never been trained: weights have been loaded before the run."""
        named = frozen_parameters(self._model) if self._left_out else {}
        self._parameters: dict[str, nn.Parameter] = named
        self._marks: dict[str, _Mark] = {}
        self._digests: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def without(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A `state_dict` under bare names as it is saved."""
        return {name: value for name, value in state.items() if name not in self._parameters}

    def expected(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A `state_dict` under bare names as a file without these parameters may have it."""
        return {name: value for name, value in state.items() if name not in self._in_file}

    def look(self, *, values: bool = False) -> None:
        """See which of them are trained by now.

        Args:
            values: see which have been written to, as well.
        """
        if not self._left_out:
            return
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        changed = [name for name in self._changed() if name not in trained] if values else []
        if changed:
            _logger.info("Frozen parameters have changed, and are saved from now on: %s.", some(changed))
        self._count_as_trained([*trained, *changed])

    def begin(self) -> None:
        """The run begins: see which are trained, and take a digest of the others."""
        self.look(values=True)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if name not in self._marks:
                    self._marks[name] = _Mark(parameter._version, _sample(parameter))
                if name not in self._digests:
                    self._digests[name] = digest(parameter)

    def before_load(self, saved: Mapping[str, Any]) -> None:
        """Saved weights are about to be loaded: what they hold, with another value, has been trained by then."""
        with torch.no_grad():
            differing = [
                name for name, own in self._parameters.items() if name in saved and not _same(own, saved[name])
            ]
        self._count_as_trained(differing)
        self._marks.clear()

    # ---------------------------------------------------------------- as a part of the state

    def state_dict(self) -> dict[str, str] | None:
        if not self._left_out:
            return None
        self.begin()
        return {name: self._digests[name] for name in self._parameters}

    def load_state_dict(self, saved: Mapping[str, str] | None) -> None:
        """Nothing to restore: the values are the script's, and compared."""

    def differences(self, saved: Mapping[str, str] | None, unknown: Collection[str]) -> list[str]:
        self._in_file = saved or {}
        named = dict(_bare_parameters(self._model))
        gone = [name for name in self._in_file if name not in named]
        present = {name: digest(named[name]) for name in self._in_file if name in named}
        other = [name for name, found in present.items() if found != (saved or {})[name]]
        self._digests |= {name: found for name, found in present.items() if name in self._parameters}
        lines = [f"the model has no {some(gone)}, frozen then and not in the file (save_frozen=False)"] if gone else []
        if other:
            text = "not in the file (save_frozen=False), have other values than those that the run was trained on"
            lines.append(f"the frozen parameters {some(other)}, {text}")
        return lines

    def _changed(self) -> list[str]:
        now = dict(_bare_parameters(self._model))
        with torch.no_grad():
            return [
                name
                for name, mark in self._marks.items()
                if now.get(name) is not self._parameters[name] or _is_written(self._parameters[name], mark)
            ]

    def _count_as_trained(self, names: Collection[str]) -> None:
        parameters = [self._parameters.pop(name) for name in names]
        for name in names:
            self._marks.pop(name, None)
            self._digests.pop(name, None)
        if self._ema is not None and parameters:
            self._ema.unshare(parameters)


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a bare model that are not trained, by all their names."""
    return {name: parameter for name, parameter in _bare_parameters(model) if not parameter.requires_grad}


def digest(tensor: Tensor) -> str:
    """Half of a sha256 of a tensor's bytes, its dtype and shape, in hex."""
    made = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach().as_subclass(Tensor).contiguous().cpu()
    made.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()[:32]


def _bare_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield bare_name(name), parameter


def _sample(tensor: Tensor) -> Tensor:
    """Up to `_NUM_SAMPLES` elements, spread over a tensor, as a copy."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _NUM_SAMPLES)][:_NUM_SAMPLES].clone()


def _is_written(tensor: Tensor, mark: _Mark) -> bool:
    return tensor._version != mark.version or not _same(_sample(tensor), mark.sample)


def _same(a: Tensor, b: Any) -> bool:
    """Equal in every bit, wherever they are."""
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (one.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for one in (a, b))
    return torch.equal(a, b)
