"""Pictures, figures, texts and histograms on their way to the writers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

_logger = logging.getLogger("torch_frame")
_MOST_WAITING = 100


class _Takes(Protocol):
    def call(self, method: str, *args: Any) -> Any: ...


class Media:
    """Brings what is added into one form, as it is at that moment, and gives it to all writers; on the main process.

    What is added before the writers are open waits for them. If no hook will open any, or the run has ended, that is told once.

    Args:
        has_taker: a hook is registered that will open writers.
        is_main: this is the process that writes; the others do nothing.
    """

    def __init__(self, has_taker: Callable[[], bool], *, is_main: bool) -> None:
        self._has_taker = has_taker
        self._is_main = is_main
        self._writers: Sequence[_Takes] | None = None
        self._waiting: list[tuple[Any, ...]] = []
        self._told: set[str] = set()
        self._has_ended = False

    def open(self, writers: Sequence[_Takes]) -> None:
        """From now on these writers take what is added, first what has waited."""
        self._writers, self._has_ended = writers, False
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self._give(*call)

    def close(self) -> None:
        """The run has ended."""
        self._writers, self._has_ended = None, True

    def image(self, step: int, name: str, image: Any) -> None:
        """A picture: a tensor or array of (H, W), (C, H, W) or (H, W, C) with C 1, 3 or 4, or a PIL image.

        Floats go from 0 to 1, and are clipped (told once a name); integers from 0 to 255; booleans are black and white.

        Raises:
            ValueError: for another shape, naming the picture.
        """
        if self._is_main:
            self._give("image", step, name, self._picture(name, image))

    def figure(self, step: int, name: str, figure: Any) -> None:
        """A matplotlib figure, drawn as a picture; pyplot's own are closed, as TensorBoard's add_figure does.

        Raises:
            TypeError: for something else, naming the figure.
        """
        if not self._is_main:
            return
        if not hasattr(figure, "canvas") or not hasattr(figure, "savefig"):
            raise TypeError(
                f"add_figure({name!r}, ...) got a {type(figure).__name__}; it has to be a matplotlib Figure."
            )
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._give("image", step, name, np.asarray(canvas.buffer_rgba()).copy())
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(figure)

    def text(self, step: int, name: str, text: Any) -> None:
        """A text; Markdown is shown where the tool knows it."""
        if self._is_main:
            self._give("text", step, name, str(text))

    def histogram(self, step: int, name: str, values: Any) -> None:
        """How the values of a tensor, array or list are distributed; NaN and infinities are left out, told once a name.

        Raises:
            ValueError: for complex values, or anything that is no number, naming the histogram.
        """
        if not self._is_main:
            return
        try:
            array = _array(values)
        except (TypeError, ValueError) as error:  # ragged lists
            raise ValueError(f"add_histogram({name!r}, ...) got what is no array: {error}") from None
        if array.dtype.kind not in "biuf":
            raise ValueError(f"add_histogram({name!r}, ...) got values of {array.dtype}; they have to be real numbers.")
        numbers = array.astype(np.float64).reshape(-1)
        finite = numbers[np.isfinite(numbers)]
        if len(finite) < len(numbers):
            self._tell(
                f"{len(numbers) - len(finite)} values of the histogram {name!r} are NaN or infinite, and left out.",
                name,
            )
        if len(finite):
            self._give("histogram", step, name, finite)
        elif not len(numbers):
            self._tell(f"The histogram {name!r} holds no value, and is not written.", name)

    def _give(self, kind: str, step: int, name: str, thing: Any) -> None:
        if self._writers is not None:
            for writer in self._writers:
                writer.call(kind, int(step), str(name), thing)
        elif not self._has_taker():
            self._tell(f"add_{kind}({name!r}, ...): nothing takes it, because no LoggerHook is registered.", kind)
        elif len(self._waiting) == _MOST_WAITING:
            self._tell(
                f"add_{kind}({name!r}, ...): it is left out, because {_MOST_WAITING} pictures, texts and histograms wait for "
                "train() already. Add them in a hook.",
                "waiting",
            )
        else:
            self._waiting.append((kind, step, name, thing))
            if self._has_ended:
                self._tell(
                    f"add_{kind}({name!r}, ...): the run has ended and its writers are closed; it is written if train() is "
                    "called again. Add it in a hook's after_train.",
                    "ended",
                )

    def _picture(self, name: str, image: Any) -> npt.NDArray[np.uint8]:
        """(H, W, C) uint8, a copy."""
        array = _array(image)
        if array.ndim == 2:
            array = array[:, :, None]
        elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size or array.dtype.kind not in "biuf":
            raise ValueError(
                f"add_image({name!r}, ...) got {array.dtype} of shape {tuple(np.shape(image))}; it has to be one picture: "
                "(H, W), (C, H, W) or (H, W, C), C being 1, 3 or 4. Of a batch, pass one, or torchvision.utils.make_grid(batch)."
            )
        if array.dtype.kind == "b":
            return (array * np.uint8(255)).astype(np.uint8)
        if array.dtype == np.uint8:
            return array.copy()
        top = 255 if array.dtype.kind in "iu" else 1
        clipped = np.nan_to_num(array.astype(np.float64), nan=0.0).clip(0, top)
        if not np.array_equal(clipped, array):
            self._tell(f"The picture {name!r} holds values outside of 0 to {top}, or NaN; they are clipped.", name)
        return np.rint(clipped * (255 / top)).astype(np.uint8)

    def _tell(self, text: str, about: str) -> None:
        if about not in self._told:
            self._told.add(about)
            _logger.warning(text)


def _array(thing: Any) -> npt.NDArray[Any]:
    if isinstance(thing, Tensor):
        tensor = thing.detach().cpu()
        return (tensor if tensor.dtype.itemsize > 2 or not tensor.is_floating_point() else tensor.float()).numpy()
    if isinstance(thing, list | tuple) and any(isinstance(part, Tensor) for part in thing):
        return np.concatenate([_array(part).reshape(-1) for part in thing])
    return np.asarray(thing)
