"""Curves of metrics.jsonl, as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_curves(
    runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], names: Sequence[str] | None = None
) -> Path:
    """Draw the metrics of one or more runs over the iterations, one panel a metric.

    Args:
        runs: work dirs with a `metrics.jsonl` each; drawn over each other.
        output: the picture; its ending says the format (.png, .svg, .pdf).
        names: metrics to draw; None: all of the first run but times.

    Returns:
        `output` as a Path.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Curves need matplotlib: pip install 'torch-frame[report]'") from error

    rows = {Path(run).name: _rows(Path(run)) for run in runs}
    first = next(iter(rows.values()))
    if names is None:
        seen = dict.fromkeys(name for row in first for name in row)
        names = [name for name in seen if name not in ("iter", "epoch", "time", "data_time", "iter_time")]
    figure = Figure(figsize=(5.0 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for index, (run, run_rows) in enumerate(rows.items()):
            points = [(row["iter"], row[name]) for row in run_rows if row.get(name) is not None]
            # Earlier runs are drawn wider, so that equal curves are all seen.
            axes.plot(*zip(*points, strict=True), label=run, linewidth=1.2 + 2.4 * (len(rows) - 1 - index), alpha=0.8)
        axes.set(title=name, xlabel="iteration")
        axes.grid(alpha=0.3)
        axes.legend(title="run")
    path = Path(output)
    figure.savefig(path, dpi=120)
    return path


def _rows(run: Path) -> list[dict[str, Any]]:
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
