"""Schedules by name, as 1.7's AccelerateTrainer takes them: a warm-up, then a way down, counted in updates.

With w = `num_warmup`, T = `num_steps` and p = (step - w) / (T - w), the learning rate is the optimizer's times

    step / w                              in the warm-up, step < w
    1 - p                                 linear
    (1 + cos(pi p)) / 2                   cosine
    (1 + cos(pi p)) / 2                   cosine_with_restarts, which has one cycle, as in 1.7
    ((lr - e) (1 - p) + e) / lr           polynomial, of power 1, with e = 1e-7
    1                                     constant_with_warmup; constant has no warm-up

The names and values are those of `get_scheduler` in Hugging Face's diffusers and transformers; behind the end all stay as they
ended, where their cosine rises again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torch_frame.errors import SettingError

POLYNOMIAL_END = 1e-7
"""The learning rate that "polynomial" ends with."""


class _Form(NamedTuple):
    """What comes after the warm-up: (p, learning rate of the optimizer) -> factor; p is 0 to 1, and 1 from the end on."""

    factor: Callable[[float, float], float]
    warms_up: bool = True


def _polynomial(p: float, lr: float) -> float:
    return ((lr - POLYNOMIAL_END) * (1.0 - p) + POLYNOMIAL_END) / lr


_FORMS = {
    "linear": _Form(lambda p, lr: 1.0 - p),
    "cosine": _Form(lambda p, lr: 0.5 * (1.0 + math.cos(math.pi * p))),
    "cosine_with_restarts": _Form(lambda p, lr: 0.5 * (1.0 + math.cos(math.pi * p))),
    "polynomial": _Form(_polynomial),
    "constant": _Form(lambda p, lr: 1.0, warms_up=False),
    "constant_with_warmup": _Form(lambda p, lr: 1.0),
}
NAMES = tuple(_FORMS)
ENDLESS = ("constant", "constant_with_warmup")
"""They need no number of steps."""


def schedule_by_name(name: str, optimizer: Optimizer, num_warmup: int, num_steps: Callable[[], int]) -> LambdaLR:
    """A schedule that steps once an update and ends with the run.

    Args:
        name: one of `NAMES`.
        num_warmup: updates in which the learning rate rises from 0.
        num_steps: gives the number of updates of the run; asked when the schedule steps, not before.

    Raises:
        SettingError: for another name, a warm-up that is no count, or a learning rate that "polynomial" cannot lower.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    >>> schedule = schedule_by_name("linear", optimizer, 2, lambda: 8)
    >>> rates = []
    >>> for _ in range(8):
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.0, 0.05, 0.1, 0.0833, 0.0667, 0.05, 0.0333, 0.0167]
    """
    check_schedule_name(name)
    if not isinstance(num_warmup, int) or num_warmup < 0:
        raise SettingError(f"warmup_iters is {num_warmup!r}; it has to be a whole number of updates, 0 for no warm-up.")
    form = _FORMS[name]
    lr = float(optimizer.defaults.get("lr", optimizer.param_groups[0]["lr"]))
    if name == "polynomial" and not lr > POLYNOMIAL_END:
        raise SettingError(
            f"lr_scheduler='polynomial' ends with a learning rate of {POLYNOMIAL_END}, but the optimizer's is {lr} already. "
            "Use a larger one, or lr_scheduler='constant'."
        )

    def factor(step: int) -> float:
        if form.warms_up and step < num_warmup:
            return step / num_warmup
        if name in ENDLESS or step == 0:
            return form.factor(0.0, lr)
        return form.factor(min((step - num_warmup) / max(num_steps() - num_warmup, 1), 1.0), lr)

    return LambdaLR(optimizer, factor)


def check_schedule_name(name: str) -> None:
    """It is one of `NAMES`.

    Raises:
        SettingError: if not.
    """
    if name == "piecewise_constant":
        raise SettingError(
            "lr_scheduler='piecewise_constant' needs rules, which a name cannot give. Pass a torch scheduler: "
            "MultiStepLR(optimizer, milestones=[...])."
        )
    if name not in _FORMS:
        raise SettingError(
            f"lr_scheduler is {name!r}; it has to be one of {', '.join(map(repr, NAMES))}, or a torch scheduler."
        )
