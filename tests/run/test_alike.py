"""What rank 0 alone has changed, the others take over before an epoch; what they cannot is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from tests.distributed.processes import on_processes
from tests.small_runs import Net, make_trainer, weights_of
from torch_frame import HookBase, SettingError
from torch_frame.distributed.ddp import DDP
from torch_frame.run.alike import share_changes, tell_of_differences


def change_on_rank_0() -> dict[str, Any]:
    strategy, model = DDP(), Net(norm=True)
    model.phase = nn.Parameter(torch.tensor([1 + 2j]))
    model.low = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), requires_grad=False)
    model.register_buffer("wide", torch.ones(1).expand(3))
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.1))
    optimizers = {"optimizer": optimizer}
    is_first = dist.get_rank() == 0
    before = tell_of_differences(strategy, model)
    if is_first:
        optimizer.param_groups[0] |= {"lr": torch.tensor(0.2), "betas": (0.5, 0.6), "weight_decay": 0.0}
        model.layers[0].bias.requires_grad_(False).data.fill_(float("nan"))
        model.layers[1].running_mean.fill_(3.0)  # type: ignore[operator, union-attr]
    differ = tell_of_differences(strategy, model)
    share_changes(strategy, model, optimizers)
    group = optimizer.param_groups[0]
    if is_first:
        model.phase.data.mul_(1j)
        model.low.data.copy_(torch.tensor([2.0, 3.0]).to(torch.float8_e4m3fn))
    told = tell_of_differences(strategy, model)
    share_changes(strategy, model, optimizers)
    found = {
        "phase": (told, complex(model.phase)),
        "low": model.low.float().tolist(),
        "same": (before, differ, tell_of_differences(strategy, model)),
        "group": (float(group["lr"]), group["betas"], group["weight_decay"]),
        "frozen": not model.layers[0].bias.requires_grad,
        "weights": weights_of(model),
    }
    if is_first:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    try:
        share_changes(strategy, model, optimizers)
    except SettingError as error:
        found["error"] = str(error)
    return found


def test_the_other_ranks_take_over_what_rank_0_has_changed(tmp_path: Path) -> None:
    first, second = on_processes(change_on_rank_0, tmp_path)
    assert first["same"] == second["same"] == (True, False, True)
    assert first["phase"] == second["phase"] == (False, -2 + 1j)
    assert first["low"] == second["low"] == [2.0, 3.0]
    assert first["group"] == second["group"]
    assert second["group"][1:] == ((0.5, 0.6), 0.0)
    assert second["frozen"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0, equal_nan=True)
    for found in (first, second):
        assert "A hook that only rank 0 has changed the model or the groups" in found["error"]


# ---------------------------------------------------------------- runs


class Does(HookBase):
    """Calls a function with the trainer, at a stage of every epoch."""

    def __init__(self, stage: str, what: Callable[[Any], None]) -> None:
        setattr(self, stage, lambda: what(self.trainer))


def set_rate(trainer: Any) -> None:
    trainer.optimizer.param_groups[0]["lr"] = 0.5 / (1 + trainer.epoch)


def set_weights(trainer: Any) -> None:
    for parameter in trainer.model_or_module.parameters():
        parameter.data.fill_(0.3)


def freeze_norm(trainer: Any) -> None:
    norm = trainer.model_or_module.layers[1].eval()
    norm.running_mean.fill_(0.7)
    norm.weight.data.fill_(2.0)


def accumulate(trainer: Any) -> None:
    trainer.gradient_accumulation_steps = 1 + trainer.epoch % 2


def train_longer(trainer: Any) -> None:
    trainer.max_epochs = 3


def replace_loader(trainer: Any) -> None:
    trainer.data_loader = loader(24)


CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rate": ("before_epoch", set_rate),
    "weights": ("before_train", set_weights),
    "modes": ("before_epoch", freeze_norm),
    "window": ("before_epoch", accumulate),
    "length": ("after_epoch", train_longer),
    "length at first": ("before_train", train_longer),
}


def loader(num: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(num, 3, generator=generator), torch.randn(num, 1, generator=generator)), 2
    )


def train(
    folder: Path, hooks: list[HookBase], before: Callable[[Any], None] | None = None, **settings: Any
) -> dict[str, Any]:
    model = Net(norm=True)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = make_trainer(folder, model, optimizer, None, loader(), 2, hooks=hooks, **settings)
    if before is not None:
        before(trainer)
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_frame").addHandler(handler)
    try:
        trainer.train(5, 3)
    except SettingError as error:
        return {"error": str(error)}
    finally:
        logging.getLogger("torch_frame").removeHandler(handler)
    weights = {name: value for name, value in weights_of(model).items() if "running" not in name}
    average = None if trainer.model_ema is None else weights_of(trainer.model_ema.model)["layers.0.weight"]
    return {"weights": weights, "iters": trainer.progress.iter, "told": told, "average": average}


def train_all(folder: Path) -> dict[str, Any]:
    is_first = dist.get_rank() == 0
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        found[name] = train(folder / name, [Does(*change)]), train(folder / name, [Does(*change)] if is_first else [])
    for stage in ("before_train", "before_epoch", "after_epoch"):
        found[f"loader {stage}"] = train(folder, [Does(stage, replace_loader)] if is_first else [])
    found["in a step"] = train(folder, [Does("after_iter", set_rate)] if is_first else [])
    found["nothing"] = train(folder, [])
    return found


def set_all_weights(trainer: Any) -> None:
    values = {name: torch.full_like(value, 0.3) for name, value in trainer.model_or_module.state_dict().items()}
    trainer.load_checkpoint(checkpoint=values)


def train_before(folder: Path) -> Any:
    of_rank = set_all_weights if dist.get_rank() == 0 else None
    return train(folder, [], set_all_weights, use_ema=True), train(folder, [], of_rank, use_ema=True)


def test_what_a_hook_of_rank_0_changes_at_an_epochs_border_is_changed_on_all_ranks(tmp_path: Path) -> None:
    """As if all had the hook; the run without any hook ends elsewhere."""
    first, second = on_processes(train_all, tmp_path, 2, tmp_path)
    for name in CHANGES:
        (on_all, alone), (_, of_second) = first[name], second[name]
        assert alone["iters"] == of_second["iters"] == on_all["iters"] == (9 if "length" in name else 6)
        for weights in (alone["weights"], of_second["weights"]):
            torch.testing.assert_close(weights, on_all["weights"], rtol=0, atol=0, msg=name)
        assert not torch.equal(on_all["weights"]["layers.0.weight"], first["nothing"]["weights"]["layers.0.weight"])
        assert alone["told"] == of_second["told"] == []
    for found in (first, second):
        for stage in ("before_train", "before_epoch", "after_epoch"):
            assert "A hook that only rank 0 has set another data_loader" in found[f"loader {stage}"]["error"]
        assert found["nothing"]["told"] == []
    (told,) = first["in a step"]["told"]
    assert "other weights by the end of this epoch" in told


def test_weights_that_only_rank_0_was_given_are_told_and_shared(tmp_path: Path) -> None:
    first, second = on_processes(train_before, tmp_path, 2, tmp_path)
    for on_all, alone in (first, second):
        torch.testing.assert_close(alone["weights"], first[0]["weights"], rtol=0, atol=0)
        torch.testing.assert_close(alone["average"], first[0]["average"], rtol=0, atol=0)
        assert on_all["told"] == []
    (told,) = first[1]["told"]
    assert "The ranks have different weights before the first step" in told
