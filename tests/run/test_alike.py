"""What rank 0 alone has changed, the others take over before an epoch; what they cannot is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from tests.distributed.processes import on_processes
from tests.small_runs import Net, weights_of
from torch_frame import SettingError
from torch_frame.distributed.ddp import DDP
from torch_frame.run.alike import share_changes, tell_of_differences


def change_on_rank_0() -> dict[str, Any]:
    strategy, model = DDP(), Net(norm=True)
    model.phase = nn.Parameter(torch.tensor([1 + 2j]))
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
    told = tell_of_differences(strategy, model)
    share_changes(strategy, model, optimizers)
    found = {
        "phase": (told, complex(model.phase)),
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
    assert first["group"] == second["group"]
    assert second["group"][1:] == ((0.5, 0.6), 0.0)
    assert second["frozen"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0, equal_nan=True)
    for found in (first, second):
        assert "A hook that only rank 0 has changed the model or the groups" in found["error"]
