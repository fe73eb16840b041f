"""What the benchmarks of the loop share: the model, and how figures are put beside the raw loop's and written down."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class TinyMLP(nn.Module):
    """32 -> 64 -> 64 -> 10: so small that the loop around it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, batch: Any) -> Tensor:
        inputs, labels = batch  # (N, 32), (N,)
        return nn.functional.cross_entropy(self.layers(inputs), labels)


def summary(times: dict[str, list[float]], unit: str) -> dict[str, dict[str, float]]:
    """row -> its median, and the median and quartiles of its ratio to the row "raw" of the same round.

    Args:
        times: row -> microseconds, one for each round.
        unit: name of the median, such as "us_per_step".
    """
    table = {}
    for row, values in times.items():
        ratios = [value / base for value, base in zip(values, times["raw"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        table[row] = {
            unit: round(statistics.median(values), 1),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_quartile_1": round(low, 3),
            "ratio_quartile_3": round(high, 3),
        }
    return table


def print_table(table: dict[str, dict[str, float]], unit: str, width: int) -> None:
    """A line for each row of a summary."""
    for row, figure in table.items():
        spread = f"{figure['ratio_quartile_1']:.3f} .. {figure['ratio_quartile_3']:.3f}"
        print(f"  {row:<{width}} {figure[unit]:8.1f} us   {figure['ratio_median']:.3f}   ({spread})")


def write(path: Path | None, figures: dict[str, Any], **settings: Any) -> None:
    """Write figures with date and device; nothing if there is no path."""
    if path is None:
        return
    setting = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        **settings,
    }
    path.write_text(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")
