"""Curves of precision over recall of a detection metric, as a matplotlib figure (extra `report`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NAMED = 12


class Curves(Protocol):
    """What is drawn: `torch_frame.metrics.PrecisionRecall`. (T, R, K, A, M) precision; -1 where a class has no truth."""

    @property
    def precision(self) -> npt.NDArray[np.float64]: ...

    @property
    def iou_thresholds(self) -> npt.NDArray[np.float64]: ...

    @property
    def rec_thresholds(self) -> npt.NDArray[np.float64]: ...

    @property
    def classes(self) -> tuple[Any, ...]: ...

    @property
    def area_ranges(self) -> tuple[str, ...]: ...

    @property
    def max_dets(self) -> tuple[int, ...]: ...


class Computable(Protocol):
    """What has such curves: `torch_frame.metrics.MeanAveragePrecision`."""

    def compute_arrays(self) -> Curves: ...


def plot_precision_recall(
    metric: Computable | Curves, *, iou: float = 0.5, area: str = "all", max_dets: int | None = None
) -> Figure:
    """Draw precision over recall: on the left the mean of all classes at each IoU, on the right each class at one IoU.

    The numbers are COCO's: the mean of a curve is the average precision that stands beside its name. Of many classes the twelve
    with the lowest one are named, and the others are grey. It can stand in an evaluation hook: `EvalTotalHook(...,
    figures={"curves": plot_precision_recall})`.

    Args:
        metric: a `MeanAveragePrecision` that has seen data, or what its `compute_arrays()` returned.
        iou: of the right side; the metric's threshold that is nearest to it counts.
        area: one of the metric's ranges of areas.
        max_dets: one of the metric's numbers of detections an image; None: the highest.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the metric has no such range or number.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Curves need matplotlib: pip install 'torch-frame[report]'") from error

    curves: Curves = metric.compute_arrays() if hasattr(metric, "compute_arrays") else metric
    limit = max(curves.max_dets) if max_dets is None else max_dets
    precision = curves.precision[
        ..., _place(area, curves.area_ranges, "area"), _place(limit, curves.max_dets, "max_dets")
    ]
    with_truth = np.flatnonzero((precision > -1).all(axis=(0, 1)))
    precision = precision[:, :, with_truth]  # (T, R, classes with truth)
    nearest = int(np.abs(curves.iou_thresholds - iou).argmin())

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if len(with_truth):
        _draw_means(left, curves, precision)
        _draw_classes(right, curves, precision[nearest], with_truth)
    left.set_title(f"mean of {len(with_truth)} classes")
    right.set_title(f"classes at IoU {curves.iou_thresholds[nearest]:.2f}")
    for axes in (left, right):
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if not len(with_truth):
            axes.text(0.5, 0.5, "no truth", ha="center", va="center")
    return figure


def _place(value: Any, values: tuple[Any, ...], name: str) -> int:
    if value not in values:
        raise ValueError(f"{name} is {value!r}, but the metric has {', '.join(map(repr, values))}.")
    return values.index(value)


def _draw_means(axes: Any, curves: Curves, precision: npt.NDArray[np.float64]) -> None:
    """precision (T, R, C)."""
    from matplotlib import colormaps

    means = precision.mean(axis=2)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(means)))
    for colour, threshold, mean in zip(colours, curves.iou_thresholds, means, strict=True):
        axes.plot(curves.rec_thresholds, mean, color=colour, label=f"IoU {threshold:.2f}: {mean.mean():.3f}")
    axes.legend(title=f"AP, mean {precision.mean():.3f}", fontsize="small", loc="lower left")


def _draw_classes(
    axes: Any, curves: Curves, precision: npt.NDArray[np.float64], with_truth: npt.NDArray[np.intp]
) -> None:
    """precision (R, C)."""
    average = precision.mean(axis=0)
    named = np.argsort(average, kind="stable")[:_MOST_NAMED]
    for k in range(len(average)):
        if k not in named:
            axes.plot(curves.rec_thresholds, precision[:, k], color="0.7", linewidth=0.6)
    for k in sorted(named.tolist()):
        label = f"{curves.classes[with_truth[k]]}: {average[k]:.3f}"
        axes.plot(curves.rec_thresholds, precision[:, k], label=label.replace("$", r"\$").lstrip("_"))
    title = "AP" if len(average) <= _MOST_NAMED else f"AP, the lowest {_MOST_NAMED}"
    axes.legend(title=title, fontsize="small", loc="lower left")
