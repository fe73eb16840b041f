"""Which parameters are trained, and which never were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.checkpoint.names import bare_name
from torch_frame.run.by_name import Names
from torch_frame.run.optimizers import some
from torch_frame.run.state import Line


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
                text = (
                    f"{some(names)} {'is' if len(names) == 1 else 'are'} {word}, as saved; the script had it {other}."
                )
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
