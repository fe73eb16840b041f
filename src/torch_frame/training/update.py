"""One update of the weights: backward, window, unscale, finite?, clip, optimizer.

The gradient of a window of micro-batches is the weighted mean over what the window really holds:

    sum_i w_i * grad(loss_i) / sum_i w_i        (w_i = loss_weight(batch), or 1)

over the micro-batches of all ranks. The sum is built as micro-batches arrive, scaled by what is known by then (the window's
nominal length, its first weight), and corrected once if the window turns out different. A full window without weights needs no
correction, and a window of one micro-batch on one rank no scaling at all: its bits are those of `loss.backward()`.

What depends on other ranks or on how the model is spread over devices is the strategy's.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.distributed.strategy import Strategy
from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.training.buffers import BufferSnapshot
from torch_frame.training.finite import FiniteCheck
from torch_frame.training.precision import Precision

OnNonFinite = Literal["raise", "skip"]
MAX_SKIPS_IN_A_ROW = 50
"""fp16: so many windows without a finite gradient mean that no scale will help (the scale has been halved each time)."""


class Update:
    """Turns losses into optimizer steps.

    Args:
        model: the trained model.
        optimizer: the optimizer of its parameters.
        precision: has the gradient scaler, if there is one.
        strategy: how backward, exchange, clipping and step are done.
        clip_grad_norm: clip the gradient to this 2-norm; 0 or less: don't.
        window_len: micro-batches in a full window (gradient_accumulation_steps).
        weighted: micro-batches have weights.
        on_nonfinite: "raise", or "skip" the update.
        on_cpu: the host may read values without waiting for a device.

    Attributes:
        grad_norm: norm of the last gradient before clipping, if clipping computed it.
        num_skipped: updates that were skipped because of a non-finite loss or gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        strategy: Strategy,
        *,
        clip_grad_norm: float,
        window_len: int,
        weighted: bool,
        on_nonfinite: OnNonFinite,
        on_cpu: bool,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self.window_len = window_len
        self.on_nonfinite = on_nonfinite
        self.num_micro_batches = 0
        self.num_skipped = 0
        self.grad_norm: Tensor | None = None
        self._strategy = strategy
        self._scaler = precision.scaler
        self._on_cpu = on_cpu
        self._weight_sum: Tensor | float = 0.0
        self._first_weight: Tensor | float = 1.0
        self._skips_in_a_row = 0
        self._may_skip = on_nonfinite == "skip" or self._scaler is not None
        several_ranks = strategy.world_size > 1
        self._scales = False  # whether losses are, in the window under way: window_len may be set between two windows
        self._shares_weights = weighted and several_ranks
        # A rank that raised before its backward pass would leave the others waiting: they look at the losses together.
        self._reads_losses = on_cpu and not self._may_skip and not several_ranks
        self._keeps_losses = on_nonfinite == "skip" or (on_cpu and self._scaler is None and several_ranks)
        self._window_losses: list[Tensor] = []
        self._exchanging: AbstractContextManager[Any] = contextlib.nullcontext()
        self.refresh()

    def refresh(self) -> None:
        """Look up the parameters anew, frozen ones too: a hook may unfreeze them at any time."""
        self._parameters = list(self.model.parameters())
        self._optimized = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._num_groups = len(self.optimizer.param_groups)
        self._plain_zero_grad = type(self.optimizer).zero_grad is Optimizer.zero_grad
        self._finite_check = FiniteCheck(self._optimized)
        # Clipping looks at the model's gradients only: parameters outside the model are checked beside it.
        self._norm_covers_all = {id(p) for p in self._optimized} <= {id(p) for p in self._parameters}
        self._buffers = BufferSnapshot(self.model) if self._may_skip else None

    def reset(self) -> None:
        """Forget a window that was interrupted, by an exception for instance."""
        self.num_micro_batches = 0

    # ---------------------------------------------------------------- the window

    @property
    def window_open(self) -> bool:
        """The gradients of some micro-batches wait for the rest of their window."""
        return self.num_micro_batches > 0

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch's forward and backward pass.

        Args:
            is_last: the window ends with it. If that is not known, say so when it turns out, by calling `step`.
        """
        if self.num_micro_batches == 0:
            self._zero_grad()
            self._window_losses.clear()
            self._scales = self.window_len > 1 or self._shares_weights
            if self._buffers is not None:
                self._buffers.take()
        return self._exchanging if is_last else self._strategy.accumulating(self.model)

    def _zero_grad(self) -> None:
        """What Optimizer.zero_grad does, without its profiling: 1 us instead of 8."""
        if len(self.optimizer.param_groups) != self._num_groups:
            self.refresh()
        if not self._plain_zero_grad:
            self.optimizer.zero_grad()
            return
        for parameter in self._optimized:
            parameter.grad = None

    def backward(self, loss: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add a micro-batch's gradient to the window's.

        Args:
            loss: one element, its mean over the micro-batch.
            weight: how many items or tokens that mean is over.
        """
        if self._reads_losses and not math.isfinite(loss.item()):
            raise NonFiniteError("the loss is not finite")
        if self._keeps_losses:
            self._window_losses.append(loss.detach().reshape(()))
        self.num_micro_batches += 1
        if self._scales:
            loss = loss * self._scale_of(weight)
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        self._strategy.backward(loss)

    def _scale_of(self, weight: Tensor | float) -> Tensor | float:
        if self._on_cpu:
            weight = float(weight)
        if self.num_micro_batches == 1:
            self._first_weight, self._weight_sum = self._mean_over_ranks(weight), 0.0
        self._weight_sum = self._weight_sum + weight
        return weight / (self._first_weight * self.window_len)

    def _correction(self) -> Tensor | float:
        """What the gradient, a mean over the ranks by now, is still to be multiplied by."""
        return self._first_weight * self.window_len / self._mean_over_ranks(self._weight_sum)

    def _mean_over_ranks(self, weight: Tensor | float) -> Tensor | float:
        """One scale for all ranks; without weights they have the same already."""
        return self._strategy.sum(weight) / self._strategy.world_size if self._shares_weights else weight

    # ---------------------------------------------------------------- the step

    def step(self) -> bool:
        """End the window: one optimizer step, or none if the gradient is not finite and may be skipped.

        Returns:
            Whether the weights were updated.

        Raises:
            NonFiniteError: before the weights are touched, on CPU.
        """
        if len(self.optimizer.param_groups) != self._num_groups:
            self.refresh()
        correction = self._correction() if self._scales else 1.0
        self.num_micro_batches = 0
        self.grad_norm = None
        self._strategy.reduce_gradients(self._optimized)
        if self._scaler is not None:
            return self._scaled_step(correction)
        gradients = self._gradients()  # kept alive through the step, which makes the optimizer's own lookup cheaper
        if isinstance(correction, Tensor) or correction != 1.0:
            torch._foreach_mul_(gradients, correction)
        if not self._may_be_used(gradients):
            self._skip()
            return False
        self._strategy.step(self.optimizer)
        return True

    def _may_be_used(self, gradients: list[Tensor]) -> bool:
        """Clip, and check that the gradient is finite if that needs no wait for a device, or is asked for."""
        if self.clip_grad_norm > 0:
            self.grad_norm = self._strategy.clip_grad_norm(self._parameters, self.clip_grad_norm)
            if not self._on_cpu and self.on_nonfinite == "raise":
                return True  # found when the recorded norms are read
            finite = math.isfinite(self.grad_norm.item()) and (self._norm_covers_all or self._finite_check(gradients))
        elif self._on_cpu or self.on_nonfinite == "skip":
            finite = self._finite_check(gradients)
        else:
            return True  # found when the recorded losses are read
        finite_losses = not self._keeps_losses or bool(torch.stack(self._window_losses).isfinite().all())
        if not self._strategy.agree(not (finite and finite_losses)):
            return True
        if self.on_nonfinite == "skip":
            return False
        if finite and finite_losses:
            raise NonFiniteError("a loss or the gradient is not finite on another rank")
        raise NonFiniteError(f"the {'gradient' if finite_losses else 'loss'} is not finite")

    def _scaled_step(self, correction: Tensor | float) -> bool:
        """fp16: the scaler decides whether the gradient may be used."""
        assert self._scaler is not None
        self._scaler.unscale_(self.optimizer)
        if isinstance(correction, Tensor) or correction != 1.0:
            torch._foreach_mul_(self._gradients(), correction)
        if self.clip_grad_norm > 0:
            self.grad_norm = self._strategy.clip_grad_norm(self._parameters, self.clip_grad_norm)
        found_inf = self._scaler._found_inf_per_device(self.optimizer)
        self._strategy.step(self.optimizer, self._scaler)  # reads it, too
        self._scaler.update()
        if not any(found.item() for found in found_inf.values()):
            self._skips_in_a_row = 0
            return True
        self._skip()
        self._skips_in_a_row += 1
        if self.on_nonfinite == "raise" and self._skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"no finite gradient in {self._skips_in_a_row} updates in a row, whatever the fp16 scale"
            )
        return False

    def _skip(self) -> None:
        self.num_skipped += 1
        self.grad_norm = None
        if self._buffers is not None:
            self._buffers.put_back()

    def _gradients(self) -> list[Tensor]:
        return [gradient for p in self._optimized if (gradient := p.grad) is not None]


def check_weight(weight: Any) -> Tensor | float:
    """A weight that `loss_weight` returned, as it can be used; a value on a device is not read.

    Raises:
        SettingError: if it is not a positive number or a one-element tensor.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise SettingError(
                f"loss_weight returned a tensor of shape {tuple(weight.shape)}; it has to have one element."
            )
        if weight.device.type != "cpu":
            return weight.detach().reshape(())
        weight = weight.item()
    if not isinstance(weight, numbers.Real) or not 0 < float(weight) < math.inf:
        raise SettingError(f"loss_weight returned {weight!r}; it has to be a positive number of items or tokens.")
    return float(weight)
