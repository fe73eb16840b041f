"""`torch-frame convert`: a checkpoint of 1.7 becomes one of today, and a table says what became of each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from torch_frame.checkpoint import convert as checkpoint

_WITHOUT = {
    "environment": "torch, device and threads it was saved with",
    "ema": "with use_ema the average begins anew from the weights; --ema takes it from the best.pth of that epoch",
    "requires_grad": "which parameters are trained: as the new trainer has it",
    "classes": "whether optimizer and scheduler are the same classes is not checked",
    "modes": "nothing is needed at an epoch's beginning",
    "attributes": "optimizers and modules that are attributes of the trainer begin anew",
    "seed": "the new trainer's own",
    "loader_seed": "an InfiniteDataLoader's own",
    "data_length": "whether the data is as long as it was is not checked",
    "data": "nothing is needed at an epoch's beginning",
    "rng": "random numbers go on from where the process is: continued, but not bitwise",
    "loader_generators": "generators that the loader was given begin anew",
}


def convert(old: str, new: str, *, ema: str | None = None, force: bool = False) -> int:
    """Convert a file and print what became of it.

    Raises:
        CheckpointError: where it cannot be converted; nothing is written then.
    """
    conversion = checkpoint.convert(old, new, ema=ema, force=force)
    print(f"{old}: a state of torch-frame 1.7, written to {new} in today's format.")
    _print_rows("Taken over", _taken_over(conversion.state))
    _print_rows("Not in the file", ((key, _WITHOUT[key]) for key in conversion.unknown))
    _print_rows("Left out", conversion.left_out.items())
    if conversion.saved_inside:
        print("\nIt was saved inside an epoch, between two batches: that epoch begins anew.")
    print(f"\nContinue with trainer.load_checkpoint({new!r}), the trainer built as it was for 1.7.")
    return 0


def _taken_over(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    progress, metrics = state["progress"], state["metric_storage"]
    schedule, optimizer = state["lr_schedulers"]["lr_scheduler"], state["optimizers"]["optimizer"]
    yield (
        "progress",
        f"{progress['epoch']} epochs, {progress['iter']} batches, {progress['num_updates']} updates are done",
    )
    yield "model", _tensors(state["model"])
    if state["ema"] is not None:
        yield "ema", _tensors(state["ema"]["model"])
    groups = optimizer["param_groups"]
    sizes = ", ".join(str(len(group["params"])) for group in groups)
    yield "optimizer", f"groups of {sizes} parameters, the state of {len(optimizer['state'])} of them"
    rates = ", ".join(f"{lr:.6g}" for lr in schedule["regular_lrs"])
    method, iters, factor = schedule["warmup"]
    yield (
        "lr_scheduler",
        f"learning rates {rates}"
        + ("" if method is None else f"; {method} warm-up from {factor:g} over {iters} updates"),
    )
    if state["grad_scaler"] is not None:
        yield "grad_scaler", f"scale {state['grad_scaler'].get('scale')}"
    yield "precision", state["precision"]
    yield "metric_storage", ", ".join(metrics) or "no value"
    for name, kept in state["hooks"].items():
        best = kept.get("cur_best") if isinstance(kept, Mapping) else None
        yield f"hook {name}", "its state" if best is None else f"best value {best:.6g}"


def _tensors(weights: Mapping[str, Any]) -> str:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors):,} numbers"


def _print_rows(title: str, rows: Any) -> None:
    rows = list(rows)
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")
