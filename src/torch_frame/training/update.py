"""One update of the weights: backward, window, unscale, finite?, clip, one optimizer or several that step as one.

The gradient of a window of micro-batches is the weighted mean over what the window really holds:

    sum_i w_i * grad(loss_i) / sum_i w_i        (w_i = loss_weight(batch), or 1)

over the micro-batches of all ranks. The sum is built as micro-batches arrive, scaled by what is known by then (the window's
nominal length, its first weight), and corrected once if the window turns out different. A full window without weights needs no
correction, and a window of one micro-batch on one rank no scaling at all: its bits are those of `loss.backward()`.

What depends on other ranks or on how the model is spread over devices is the strategy's.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_frame.distributed.strategy import SingleProcess, Strategy
from torch_frame.errors import NonFiniteError, SettingError
from torch_frame.training.buffers import BufferSnapshot
from torch_frame.training.finite import FiniteCheck, spoiled_gradients, what_is_not_finite
from torch_frame.training.precision import NOTHING, Precision

OnNonFinite = Literal["raise", "skip"]
MAX_SKIPS_IN_A_ROW = 50
"""fp16: so many windows without a finite gradient mean that no scale will help (the scale has been halved each time)."""


class Update:
    """Turns losses into steps of one optimizer, or of several that are finite, clipped, stepped and skipped as one.

    Args:
        model: the trained model.
        optimizers: of its parameters.
        precision: has the gradient scaler, if there is one.
        strategy: how backward, exchange, clipping and step are done.
        clip_grad_norm: clip the gradient to this 2-norm; 0 or less: don't.
        window_len: micro-batches in a full window (gradient_accumulation_steps).
        weighted: micro-batches have weights.
        on_nonfinite: "raise", or "skip" the update.
        on_cpu: the host may read values without waiting for a device.
        is_alone: all gradients are its own; False: other optimizers step by other losses (a GAN), so a loss puts gradient into
            these optimizers' parameters only, and the scaler is updated by the caller.

    Attributes:
        grad_norm: norm of the last gradient before clipping, if clipping computed it.
        num_skipped: updates that were skipped because of a non-finite loss or gradient.
        has_unscaled: the last update's gradient went through the scaler.
        trusts_exchange: a gradient that is not finite on one rank is so on all, by the strategy's exchange, so they need not
            ask each other. A loss that is not finite spoils its rank's gradient then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        precision: Precision,
        strategy: Strategy,
        *,
        clip_grad_norm: float,
        window_len: int,
        weighted: bool,
        on_nonfinite: OnNonFinite,
        on_cpu: bool,
        is_alone: bool = True,
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self.clip_grad_norm = clip_grad_norm
        self.window_len = window_len
        self.on_nonfinite = on_nonfinite
        self.num_micro_batches = 0
        self.num_skipped = 0
        self.has_unscaled = False
        self.grad_norm: Tensor | None = None
        self._strategy = strategy
        self._scaler = precision.scaler
        self._on_cpu = on_cpu
        self._weight_sum: Tensor | float = 0.0
        self._first_weight: Tensor | float = 1.0
        self._skips_in_a_row = 0
        self._may_skip = on_nonfinite == "skip" or self._scaler is not None
        self._is_alone = is_alone
        self._is_collected = False  # the window's gradient is its mean by now
        several_ranks = strategy.world_size > 1
        self._nominal_len = window_len  # of the window under way: window_len may be set at any time
        self._scales = False  # whether losses are, in the window under way
        self._weighted = weighted
        self._has_weights = weighted  # in the window under way: a weight may be given with each loss, too
        self._several_ranks = several_ranks
        own_reduce = getattr(strategy.reduce_gradients, "__func__", None)  # an object may carry its own, too
        self._reduces = own_reduce is not SingleProcess.reduce_gradients
        self._reads_losses = on_cpu and self._scaler is None
        # A rank that raised before its backward pass would leave the others waiting.
        self._raises_at_once = not self._may_skip and not several_ranks
        self._has_bad_loss = False
        self._keeps_losses = on_nonfinite == "skip" and not on_cpu
        self._window_losses: list[Tensor] = []
        self.trusts_exchange = False
        self.refresh()

    def refresh(self) -> None:
        """Look up the parameters anew, frozen ones too: a hook may unfreeze them at any time."""
        optimized = {
            id(p): p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        in_model = {id(p): p for p in self.model.parameters()}
        # In the model's order, as a loop by hand clips: the last bits of a norm depend on the order.
        self._optimized = [p for key, p in in_model.items() if key in optimized]
        self._optimized += [p for key, p in optimized.items() if key not in in_model]
        self._num_groups = [(optimizer, len(optimizer.param_groups)) for optimizer in self.optimizers]
        self._with_own_zero_grad = [
            one for one in self.optimizers if type(one).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(one)
        ]
        # All the model's: what no optimizer has would add up for ever.
        self._to_clear = list({**in_model, **optimized}.values()) if self._is_alone else self._optimized
        self._finite_check = FiniteCheck(self._optimized)
        self._buffers = BufferSnapshot(self.model) if self._may_skip else None

    def reset(self) -> None:
        """Forget a window that was interrupted, by an exception for instance."""
        self.num_micro_batches = 0
        self._is_collected = False

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
            self.begin()
            if self._buffers is not None:
                self.note_buffers()
        return NOTHING if is_last else self._strategy.accumulating(self.model)

    def begin(self) -> None:
        """A window begins: gradients are cleared. What Optimizer.zero_grad does, without its profiling: 1 us instead of 8."""
        for optimizer, num in self._num_groups:
            if len(optimizer.param_groups) != num:
                self.refresh()
        self._window_losses.clear()
        self._has_bad_loss = False
        self._is_collected = False
        for optimizer in self._with_own_zero_grad:
            optimizer.zero_grad()
        for parameter in self._to_clear:
            parameter.grad = None

    def note_buffers(self) -> None:
        """Before a forward pass: the buffers are as they are to be if the update is skipped."""
        if self._buffers is not None:
            self._buffers.take()

    def backward(self, loss: Tensor, weight: Tensor | float | None = None) -> None:
        """Add a micro-batch's gradient to the window's.

        Args:
            loss: one element, its mean over the micro-batch.
            weight: how many items or tokens that mean is over; None: all micro-batches count the same.
        """
        is_bad = self._reads_losses and not math.isfinite(loss.item())
        if is_bad:
            if self._raises_at_once:
                raise NonFiniteError("the loss is not finite")
            self._has_bad_loss = True
        if self._keeps_losses:
            self._window_losses.append(loss.detach().reshape(()))
        if self.num_micro_batches == 0:
            self._has_weights = self._weighted or weight is not None
            self._nominal_len = self.window_len
            self._scales = self._nominal_len > 1 or (self._has_weights and self._several_ranks)
        elif (weight is not None) is not self._has_weights:
            raise SettingError(
                "Some batches of a window of gradient_accumulation_steps have a weight, others none. Give each one a weight."
            )
        self.num_micro_batches += 1
        if self._scales:
            loss = loss * self._scale_of(1.0 if weight is None else weight)
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        inputs = None if self._is_alone else self._trained()
        if is_bad and self.trusts_exchange:
            with spoiled_gradients(self._optimized):
                self._strategy.backward(loss, inputs)
        else:
            self._strategy.backward(loss, inputs)

    def _trained(self) -> list[Tensor]:
        trained: list[Tensor] = [p for p in self._optimized if p.requires_grad]
        if not trained:
            raise SettingError("update() got a loss for an optimizer none of whose parameters requires a gradient.")
        return trained

    def _scale_of(self, weight: Tensor | float) -> Tensor | float:
        if self._on_cpu:
            weight = float(weight)
        if self.num_micro_batches == 1:
            self._first_weight, self._weight_sum = self._mean_over_ranks(weight), 0.0
        self._weight_sum = self._weight_sum + weight
        return weight / (self._first_weight * self._nominal_len)

    def _correction(self) -> Tensor | float:
        """What the gradient, a mean over the ranks by now, is still to be multiplied by."""
        is_first = self.num_micro_batches == 1  # its mean over the ranks is known
        mean = self._first_weight if is_first else self._mean_over_ranks(self._weight_sum)
        return self._first_weight * self._nominal_len / mean

    def _mean_over_ranks(self, weight: Tensor | float) -> Tensor | float:
        """One scale for all ranks; without weights they have the same already."""
        shares = self._has_weights and self._several_ranks
        return self._strategy.sum(weight) / self._strategy.world_size if shares else weight

    # ---------------------------------------------------------------- the step

    def collect(self) -> None:
        """The window is complete: its gradient becomes the mean over all of it and over the ranks, unscaled."""
        for optimizer, num in self._num_groups:
            if len(optimizer.param_groups) != num:
                self.refresh()
        self._is_collected = True
        correction = self._correction() if self._scales else 1.0
        if self._reduces:
            self._strategy.reduce_gradients(self._optimized)
        if not self._is_alone and not self._gradients():
            raise SettingError(
                "update() got a loss that depends on none of the named optimizer's parameters. Is it the loss of another one?"
            )
        if self._scaler is not None:
            for optimizer in self.optimizers:
                self._scaler.unscale_(optimizer)
        if isinstance(correction, Tensor) or correction != 1.0:
            gradients = self._gradients()
            if gradients:  # none if a window's losses depend on other parameters only
                torch._foreach_mul_(gradients, correction)

    def step(self) -> bool:
        """End the window: one step of each optimizer, or none if the gradient is not finite and may be skipped.

        What a hook has changed since `collect` counts.

        Returns:
            Whether the weights were updated.

        Raises:
            NonFiniteError: before the weights are touched, on CPU.
        """
        was_seen = self._is_collected
        if not was_seen:
            self.collect()
        self.num_micro_batches = 0
        self.grad_norm = None
        if self._scaler is not None:
            return self._scaled_step(was_seen)
        # kept alive through the step, which makes the optimizer's own lookup cheaper
        gradients = [gradient for p in self._optimized if (gradient := p.grad) is not None]
        if not self._may_be_used(gradients):
            self._skip()
            return False
        for optimizer in self.optimizers:
            self._strategy.step(optimizer)
        return True

    def _may_be_used(self, gradients: list[Tensor]) -> bool:
        """Clip, and check that the gradient is finite if that needs no wait for a device, or is asked for."""
        if self.clip_grad_norm > 0:
            self.grad_norm = self._strategy.clip_grad_norm(self._optimized, self.clip_grad_norm)
            if not self._on_cpu and self.on_nonfinite == "raise":
                return True  # found when the recorded norms are read
            finite = math.isfinite(self.grad_norm.item())
        elif self._on_cpu or self.on_nonfinite == "skip":
            finite = self._finite_check(gradients)
        else:
            return True  # found when the recorded losses are read
        losses = not self._has_bad_loss
        if self._window_losses:
            losses = bool(torch.stack(self._window_losses).isfinite().all())
        is_bad = not (finite and losses)
        if self.trusts_exchange:
            if finite and not losses:  # a parameter's own hook has mended it: the other ranks do not know
                raise NonFiniteError("the loss is not finite")
        elif self._several_ranks:
            is_bad = self._strategy.agree(is_bad)
        if not is_bad:
            return True
        if self.on_nonfinite == "skip":
            return False
        raise NonFiniteError(what_is_not_finite(self._strategy, losses=losses, gradient=finite))

    def _scaled_step(self, look_again: bool) -> bool:
        """fp16: the scaler decides whether the gradient may be used.

        Args:
            look_again: a hook has seen the gradient, and may have changed it.
        """
        assert self._scaler is not None
        found = [self._scaler._per_optimizer_states[id(one)]["found_inf_per_device"] for one in self.optimizers]
        if look_again:
            self._note_nonfinite(found)
        flags = [flag for one in found for flag in one.values()]
        if len(flags) > 1:  # one for all
            worst = torch.stack([flag.to(flags[0].device) for flag in flags]).max()
            for flag in flags:
                flag.copy_(worst)
        if self.clip_grad_norm > 0:
            self.grad_norm = self._strategy.clip_grad_norm(self._optimized, self.clip_grad_norm)
        for optimizer, has_gradient in zip(self.optimizers, found, strict=True):
            if has_gradient:
                self._strategy.step(optimizer, self._scaler)  # reads the flags, too
        self.has_unscaled = bool(flags)
        if self._is_alone and flags:
            self._scaler.update()
        if not any(flag.item() for flag in flags):
            self._skips_in_a_row = 0
            return True
        self._skip()
        self._skips_in_a_row += 1
        if self.on_nonfinite == "raise" and self._skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise NonFiniteError(
                f"no finite gradient in {self._skips_in_a_row} updates in a row, whatever the fp16 scale"
            )
        return False

    def _note_nonfinite(self, found: Sequence[dict[torch.device, Tensor]]) -> None:
        """Add what a hook has made of the gradients to what the scaler knows of them."""
        for optimizer, flags in zip(self.optimizers, found, strict=True):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None and p.grad.device in flags:
                        values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                        flags[p.grad.device].logical_or_(~values.isfinite().all())

    def _skip(self) -> None:
        self.num_skipped += 1
        self.grad_norm = None
        if self._buffers is not None:
            self._buffers.put_back()

    def _gradients(self) -> list[Tensor]:
        return [gradient for p in self._optimized if (gradient := p.grad) is not None]


def check_weight(weight: Any, what: str = "loss_weight returned") -> Tensor | float:
    """A weight that `loss_weight` returned, as it can be used; a value on a device is not read.

    Args:
        what: where it comes from, for the error.

    Raises:
        SettingError: if it is not a positive number or a one-element tensor.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise SettingError(f"{what} a tensor of shape {tuple(weight.shape)}; it has to have one element.")
        if weight.device.type != "cpu":
            return weight.detach().reshape(())
        weight = weight.item()
    if not isinstance(weight, numbers.Real) or not 0 < float(weight) < math.inf:
        raise SettingError(f"{what} {weight!r}; it has to be a positive number of items or tokens.")
    return float(weight)
