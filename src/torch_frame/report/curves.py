"""Curves of metrics.jsonl, as a picture."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMES = ("iter", "epoch", "time", "data_time", "iter_time")


def plot_curves(
    runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], names: Sequence[str] | None = None
) -> Path:
    """Draw the metrics of one or more runs over the iterations, one panel a metric.

    Args:
        runs: work dirs with a `metrics.jsonl` each; drawn over each other. A run's label is as much of its path as tells it from
            the others.
        output: the picture; its ending says the format (.png, .svg, .pdf).
        names: metrics to draw; None: all of the first run but times.

    Returns:
        `output` as a Path.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
        ValueError: no run has a value of a name, or none is there at all.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Curves need matplotlib: pip install 'torch-frame[report]'") from error

    rows = [_rows(Path(run)) for run in runs]
    there = dict.fromkeys(name for of_run in rows for row in of_run for name in row if name not in _TIMES)
    if names is None:
        names = [name for name in there if any(name in row for row in rows[0])]
    missing = [name for name in names if name not in there]
    if missing or not names:
        raise ValueError(
            f"No run has {', '.join(map(repr, missing)) or 'a value to draw'}; in metrics.jsonl are "
            f"{', '.join(map(repr, there)) or 'none'}."
        )
    labels = short_names(runs)
    figure = Figure(figsize=(5.0 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for index, (run, run_rows) in enumerate(zip(labels, rows, strict=True)):
            points = [(row["iter"], row[name]) for row in run_rows if row.get(name) is not None]
            if not points:
                continue
            # Earlier runs are drawn wider, so that equal curves are all seen.
            width = 1.2 + 2.4 * (len(rows) - 1 - index)
            axes.plot(*zip(*points, strict=True), label=run.lstrip("_"), linewidth=width, alpha=0.8)
        axes.set(title=name, xlabel="iteration")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(title="run")
    path = Path(output)
    figure.savefig(path, dpi=120)
    return path


def short_names(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The last parts of the paths, as many as tell them apart.

    >>> short_names(["a/run_1", "a/run_2"]), [name.replace(os.sep, "/") for name in short_names(["a/run", "b/run"])]
    (['run_1', 'run_2'], ['a/run', 'b/run'])
    """
    paths = [Path(os.path.abspath(folder)).parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        names = [os.path.join(*parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [os.fspath(folder) for folder in folders]


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = []
    with (run / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a killed process may have left half a line
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "iter" in row]
