"""Several processes, each with the whole model: torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torch_frame.distributed.channel import Channel
from torch_frame.distributed.launch import join_group
from torch_frame.distributed.strategy import SingleProcess, Summable, wrapper_of

T = TypeVar("T")
_logger = logging.getLogger("torch_frame")

_NONE, _DENSE, _SPARSE = range(3)  # kinds of gradients
CommHook = str | Callable[[Any, Any], Any] | tuple[Any, Callable[[Any, Any], Any]]


class DDP(SingleProcess):
    """Each rank trains the whole model on its part of the data; gradients are averaged in backward.

    The model is wrapped in DistributedDataParallel, or was wrapped by the script already. Make it on all ranks, with a process
    group or under torchrun.

    Args:
        find_unused_parameters: some parameters take no part in some steps.
        gradient_as_bucket_view: gradients share memory with the buckets that are exchanged: less memory.
        static_graph: every step has the same graph.
        bucket_cap_mb: size of a bucket, MiB; None: torch's.
        comm_hook: how gradients are exchanged: "fp16" or "bf16" (compressed), a hook of torch's, or a pair (state, hook).
        sync_batchnorm: batch norm over the batch of all ranks; needs GPUs.
        own_shards: the data loader gives each rank a part of its own already; it is used as it is.
        short_batch: if the last batch of an epoch has fewer samples than there are ranks, "wrap" gives some samples to two ranks,
            so that none is left out, "drop" leaves the batch out, so that none counts twice.
        timeout_s: how long a rank waits for the others at a flag, a save or an evaluation; None: as the process group.

    Raises:
        ValueError: with neither a process group nor torchrun's environment, or for an unknown name.
    """

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        comm_hook: CommHook | None = None,
        sync_batchnorm: bool = False,
        own_shards: bool = False,
        short_batch: str = "wrap",
        timeout_s: float | None = None,
    ) -> None:
        if short_batch not in ("wrap", "drop"):
            raise ValueError(f"short_batch is {short_batch!r}; it has to be 'wrap' or 'drop'.")
        join_group()
        self.own_shards = own_shards
        self.short_batch = short_batch
        self._settings: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }
        if bucket_cap_mb is not None:
            self._settings["bucket_cap_mb"] = bucket_cap_mb
        self._comm_hook = _comm_hook(comm_hook)
        self._sync_batchnorm = sync_batchnorm
        self._channel = Channel(timeout_s)
        self.rank, self.world_size = self._channel.rank, self._channel.world_size
        self._wrapped: DistributedDataParallel | None = None
        self._is_exchanged = True  # by the last backward
        self._has_exchanged = False  # some backward
        self._was_called = False  # the wrapped model, since then
        self._told = False
        self._reduced: frozenset[int] = frozenset()  # ids of the parameters that DDP exchanges
        self._asked: tuple[Sequence[Tensor] | None, list[Tensor]] = (None, [])
        self._is_warm = False

    # ---------------------------------------------------------------- the model and its step

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel; one that is wrapped already, and perhaps compiled, is used as it is.

        Raises:
            ValueError: for a setting that a wrapped model cannot be given any more, or that its device does not have.
        """
        given = wrapper_of(model)
        if isinstance(given, DistributedDataParallel):
            self._check_unset()
            wrapped = given
        else:
            wrapped = model = self._wrap(model)
        if self._comm_hook is not None:
            wrapped.register_comm_hook(*self._comm_hook)
        model.register_forward_pre_hook(self._note_call)  # of torch.compile(DDP(...)) outside of what is compiled
        self._wrapped = wrapped
        self._reduced = frozenset(id(p) for p in wrapped.module.parameters() if p.requires_grad)
        return model

    def replicate(self, model: nn.Module) -> nn.Module:
        """The bare model.

        DistributedDataParallel cannot put a loss's gradient into some of the parameters only.

        Raises:
            ValueError: for a model that is wrapped, or for settings of the wrapper.
        """
        if isinstance(wrapper_of(model), DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, but a dict of optimizers needs the bare one. Pass model.module."
            )
        given = [name for name, value in self._settings.items() if value]
        given += ["comm_hook"] if self._comm_hook is not None else []
        given += ["sync_batchnorm"] if self._sync_batchnorm else []
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot be set with a dict of optimizers, for which the model is not wrapped."
            )
        devices = {p.device for p in (*model.parameters(), *model.buffers())}
        self._check_own_device(next(iter(devices)) if len(devices) == 1 else torch.device("cpu"))
        return model

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        for group in _by_kind(tensors).values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.broadcast(flat, 0)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _wrap(self, model: nn.Module) -> DistributedDataParallel:
        devices = {p.device for p in (*model.parameters(), *model.buffers())}
        if self._sync_batchnorm:
            if any(device.type == "cpu" for device in devices):
                raise ValueError("sync_batchnorm=True needs GPUs: torch's SyncBatchNorm does not run on the CPU.")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        (device,) = devices if len(devices) == 1 else (torch.device("cpu"),)
        self._check_own_device(device)
        return WithMethods(model, None if device.type == "cpu" else [device], **self._settings)

    def _check_unset(self) -> None:
        given = [name for name, value in self._settings.items() if value]
        given += ["sync_batchnorm"] if self._sync_batchnorm else []
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot be set for a model that is wrapped in DistributedDataParallel already. Wrap it with "
                "these settings, or pass the bare model."
            )

    def _check_own_device(self, device: torch.device) -> None:
        """NCCL's own error about two ranks on one GPU comes late, and names neither."""
        refuses = device.type == "cuda" and "nccl" in str(dist.get_backend_config())
        place = (_host(), str(device)) if refuses else None
        places = self.gather(place)
        if place is not None and places.count(place) > 1:
            ranks = [rank for rank, other in enumerate(places) if other == place]
            raise ValueError(
                f"The model is on {device} on the ranks {ranks} of one machine. Give each rank a GPU of its own: "
                "torch.cuda.set_device(int(os.environ['LOCAL_RANK'])) before model.cuda(), or Trainer(..., device='cuda')."
            )

    def accumulating(self, model: nn.Module) -> AbstractContextManager[Any]:
        wrapped = self._wrapped
        # DDP learns a static graph in a pass that exchanges; averaging twice does no harm.
        if wrapped is None or (wrapped.static_graph and not self._has_exchanged):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def backward_of(self, loss: Tensor, inputs: Sequence[Tensor] | None) -> Callable[[], None]:
        """The backward pass itself, to be called: so no frame more stands above its errors."""
        return partial(loss.backward, inputs=inputs)

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        syncs = self._wrapped is not None and self._wrapped.require_backward_grad_sync
        if syncs and _depends_on_nothing(loss, self._reduced):
            loss = self._with_zero_gradients(loss)
        self.backward_of(loss, inputs)()
        if syncs and not self._was_called and not self._told:
            self._told = True
            _logger.info(
                "The step calls methods of the model, not the model itself, so DistributedDataParallel does not see it: "
                "gradients are averaged behind backward instead of during it."
            )
        self._is_exchanged = syncs and self._was_called
        self._has_exchanged |= self._is_exchanged
        self._was_called = False

    def _with_zero_gradients(self, loss: Tensor) -> Tensor:
        """A loss that reaches no parameter (a batch without targets): the other ranks wait for this one's gradients, of zero.

        Raises:
            ValueError: if the model was not called, so it would not exchange them.
        """
        assert self._wrapped is not None
        if not self._was_called and self._has_exchanged:
            raise ValueError(
                f"The step on rank {self.rank} returned a loss that depends on no parameter, and has not called the model, as it "
                "did before: the other ranks would wait for its gradients. Call the model, and return its output times 0."
            )
        if not self._was_called:
            return loss
        trained = [p for p in self._wrapped.module.parameters() if p.requires_grad and id(p) in self._reduced]
        return loss + sum((p.sum().to(loss) for p in trained), torch.zeros_like(loss)) * 0

    def _note_call(self, model: nn.Module, inputs: Any) -> None:
        self._was_called = True

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Average what `backward` did not: all, of a window that ended unforeseen or of a step that calls the model's methods;
        else the gradients of parameters that DDP does not know."""
        if not self._is_exchanged:
            self._average([p for p in parameters if p.requires_grad])
            self._is_exchanged = True
            if self._wrapped is not None:
                self._wrapped.require_forward_param_sync = True  # as after a backward pass that exchanged
            return
        for_list, unknown = self._asked
        if for_list is not parameters:
            unknown = [p for p in parameters if id(p) not in self._reduced]
            self._asked = (parameters, unknown)
        if unknown:
            self._average([p for p in unknown if p.requires_grad])  # unfrozen since the model was wrapped

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Average gradients; a rank that has none counts as zero, and none is made if no rank has one."""
        if not parameters:
            return
        kinds = torch.tensor([_kind(p.grad) for p in parameters], dtype=torch.uint8, device=parameters[0].device)
        dist.all_reduce(kinds, op=dist.ReduceOp.MAX)
        of_all = list(zip(parameters, kinds.tolist(), strict=True))
        for (device, dtype), group in _by_kind(p for p, kind in of_all if kind == _DENSE).items():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(device, dtype)
            dist.all_reduce(flat)
            flat /= self.world_size
            for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                p.grad = part.view_as(p).clone()
        for p in (p for p, kind in of_all if kind == _SPARSE):
            total = _no_rows(p) if p.grad is None else p.grad.coalesce()
            dist.all_reduce(total)
            p.grad = total / self.world_size

    def warm_up(self, step: Callable[[], None]) -> None:
        """Let a new wrapper put its buckets in order, as the first backward pass of the run that is resumed did.

        With two ranks the order changes no bit: a sum of two does not depend on it.
        """
        if self.world_size > 2 and not self._is_warm and not self._settings["find_unused_parameters"]:
            self._is_warm = True
            step()

    @property
    def shares_gradients(self) -> bool:
        """See the function: not with an exchange that is not known here, nor over some of the parameters or ranks only."""
        wrapped = self._wrapped
        if wrapped is None:
            return True  # `reduce_gradients` averages them
        hooks = [hook for hook, _ in wrapped._comm_hooks]
        return all(hook in _same_on_all_ranks() for hook in hooks) and self.keeps_ranks_alike

    @property
    def keeps_ranks_alike(self) -> bool:
        """See the function: not if some parameters or ranks are left out of the exchange."""
        wrapped = self._wrapped
        if wrapped is None:
            return True
        return not wrapped.parameters_to_ignore and dist.get_world_size(wrapped.process_group) == self.world_size

    # ---------------------------------------------------------------- together

    def agree(self, flag: bool) -> bool:
        return self._channel.agree(flag)

    def sum(self, value: Summable) -> Summable:
        total: Any
        if not isinstance(value, Tensor):
            total = self._channel.sum(float(value))
        elif value.device.type == "cpu":
            total = value.new_full(value.shape, self._channel.sum(value.item()))
        else:
            total = value.detach().clone()
            dist.all_reduce(total)  # on the device: nothing is read from it
        summed: Summable = total
        return summed

    def gather(self, value: T) -> list[T]:
        return self._channel.gather(value)

    def collect(self, value: T) -> list[T]:
        return self._channel.collect(value)

    def broadcast(self, value: T) -> T:
        received: T = self._channel.broadcast(value)
        return received

    def alone(self) -> AbstractContextManager[None]:
        return self._channel.alone()

    def tell_failure(self, what: str) -> None:
        self._channel.tell_failure(what)

    def failure(self) -> str | None:
        return self._channel.failure()


class WithMethods(DistributedDataParallel):
    """Has the model's methods and attributes, so that a step written for the bare model runs."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)


def _kind(gradient: Tensor | None) -> int:
    return _NONE if gradient is None else _SPARSE if gradient.is_sparse else _DENSE


def _no_rows(parameter: Tensor) -> Tensor:
    """The sparse gradient of an embedding that was not asked for any row."""
    indices = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
    return torch.sparse_coo_tensor(indices, parameter.new_empty(0, *parameter.shape[1:]), parameter.shape)


def _by_kind(parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    return kinds


def _depends_on_nothing(loss: Tensor, parameters: frozenset[int]) -> bool:
    """The loss's graph is a few nodes, and none of them is a parameter; a graph that goes on is not followed.

    Args:
        parameters: their ids.
    """
    nodes = [loss.grad_fn]
    for _ in range(6):
        if not nodes:
            return True
        node = nodes.pop()
        if node is not None and id(getattr(node, "variable", None)) in parameters:
            return False
        nodes += [] if node is None else [following for following, _ in node.next_functions]
    return False


def _same_on_all_ranks() -> tuple[Any, ...]:
    """torch's exchanges of which all ranks get the same sum, NaN included."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook


def _comm_hook(hook: CommHook | None) -> tuple[Any, Callable[[Any, Any], Any]] | None:
    if hook is None:
        return None
    if callable(hook):
        return None, hook
    if isinstance(hook, tuple):
        return hook
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    known = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    if hook not in known:
        raise ValueError(f"comm_hook is {hook!r}; it has to be 'fp16', 'bf16', a hook, or a pair (state, hook).")
    return None, known[hook]


def _host() -> str:
    import socket

    return socket.gethostname()
