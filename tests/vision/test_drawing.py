"""Pictures of detections: what is on them, at which size, and that nothing else happens."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_runs import ROOT, environment
from torch_frame.vision import draw, draw_grid

pytest.importorskip("matplotlib")


def pixels(figure: Any) -> np.ndarray:
    """(H, W, 3) uint8, as the figure is saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def picture(height: int = 32, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_small_picture_is_enlarged_pixel_by_pixel_and_keeps_its_values():
    image = picture()
    drawn = pixels(draw(image))
    assert drawn.shape == (512, 640, 3)
    assert np.array_equal(drawn[8::16, 8::16], image)


def test_a_box_stands_on_the_edges_of_its_pixels_in_its_own_colour():
    grey = np.full((32, 40), 128, np.uint8)
    drawn = pixels(draw(grey, [[5, 10, 20, 25]], [0])).astype(int)
    changed = np.abs(drawn - 128).max(axis=2) > 40
    rows, columns = np.nonzero(changed[26 * 16 - 8 :].any(axis=1)), None
    assert not rows[0].size  # nothing below the box
    rows, columns = np.nonzero(changed)
    assert abs(columns.min() - 5 * 16) <= 3
    assert abs(columns.max() - 20 * 16) <= 3
    assert abs(rows.max() - 25 * 16) <= 3
    assert not changed[11 * 16 : 24 * 16, 6 * 16 : 19 * 16].any()  # and nothing inside it
    left, top = drawn[18 * 16, 5 * 16], drawn[10 * 16, 15 * 16]
    assert np.abs(left - top).max() <= 2
    assert np.ptp(left) > 40  # it is a colour


def test_classes_have_colours_of_their_own_which_do_not_depend_on_the_others():
    grey = np.full((32, 40), 128, np.uint8)

    def colour(label: Any, **settings: Any) -> tuple[float, ...]:
        return tuple(draw(grey, [[5, 5, 20, 20]], [label], **settings).axes[0].patches[0].get_edgecolor())

    of_numbers = [colour(k) for k in range(20)]
    assert len(set(of_numbers)) == 20
    names = [f"class {k}" for k in range(20)]
    assert [colour(k, classes=names) for k in range(20)] == of_numbers
    assert [colour(name, classes=names) for name in names] == of_numbers
    assert colour("cat") == colour("cat")


def test_a_mask_is_painted_over_the_pixels_inside_it_only():
    image, mask = picture(), np.zeros((1, 32, 40), bool)
    mask[0, 4:20, 5:18] = True
    drawn = pixels(draw(image, masks=mask))[8::16, 8::16]
    assert np.array_equal(drawn[~mask[0]], image[~mask[0]])
    change = drawn[mask[0]].astype(float) - 0.55 * image[mask[0]]
    assert np.ptp(change, axis=0).max() <= 2  # the same colour everywhere
    integers = pixels(draw(image, masks=torch.from_numpy(mask).int() * 7))[8::16, 8::16]
    assert np.array_equal(integers, drawn)


def test_labels_scores_and_their_order():
    boxes = [[1, 1, 9, 9], [11, 1, 19, 9], [21, 1, 29, 9]]
    assert texts(draw(picture(), boxes, [0, 1, 5], [0.5, 0.912, 0.2], classes=["cat", "dog"])) == [
        "5 0.20",
        "cat 0.50",
        "dog 0.91",
    ]
    assert texts(draw(picture(), boxes, ["a", "$b$", "c_d"])) == ["a", "$b$", "c_d"]
    assert texts(draw(picture(), boxes, scores=[0.1, 0.2, 0.3], min_score=0.2)) == ["0.20", "0.30"]
    assert texts(draw(picture(), boxes, torch.tensor([2, 1, 0]), torch.tensor([0.1, 0.2, 0.3]))) == [
        "2 0.10",
        "1 0.20",
        "0 0.30",
    ]
    pixels(draw(picture(), boxes, [r"$\frac{$", "$a", "100 %"]))  # names are no formulas
    odd = [None, float("nan"), (1, 2)]
    assert texts(draw(picture(), boxes, odd, classes=["cat"])) == ["None", "nan", "(1, 2)"]
    assert texts(draw(picture(), boxes, np.array(["a", "b", "c"]), classes=["cat"])) == ["a", "b", "c"]
    assert texts(draw(picture(), boxes)) == []
    assert texts(draw(picture(), boxes, [0, 1, 2], [0.5, float("nan"), 0.2]))[-1] == "0 0.50"


def test_what_lies_outside_is_cut_or_left_out():
    figure = draw(picture(), [[-10, -10, 5, 5], [100, 100, 120, 120], [5, 5, 5, 9], [9, 9, 3, 3]], [0, 1, 2, 3])
    assert texts(figure) == ["0"]
    assert figure.axes[0].patches[0].get_bbox().extents.tolist() == [0, 0, 5, 5]
    assert texts(draw(picture(), [[float("-inf"), 0, float("inf"), float("nan")]], [0])) == []


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (8, 8), (28, 28), (96, 300), (480, 640), (3000, 4000), (1, 5000), (5000, 3)]
)
def test_a_picture_of_any_size_fits_a_screen_and_its_labels_are_inside_and_large_enough(height, width):
    boxes = [[0, 0, width, height], [width * 0.6, height * 0.6, width, height], [0, height * 0.7, width * 0.5, height]]
    boxes.append([width * 0.95, height * 0.1, width, height * 0.4])
    figure = draw(np.zeros((height, width), np.uint8), boxes, ["person"] * 4, [0.9, 0.8, 0.7, 0.6])
    drawn = pixels(figure)
    assert 640 <= max(drawn.shape[:2]) <= 1600
    assert min(drawn.shape[:2]) >= 48
    assert len(texts(figure)) == 4
    for text in figure.axes[0].texts:
        assert 5.5 <= text.get_fontsize() <= 10
        if min(drawn.shape[:2]) > 100:  # there is room for it
            extent = text.get_window_extent()
            assert extent.x0 >= -3
            assert extent.y0 >= -3
            assert extent.x1 <= drawn.shape[1] + 3
            assert extent.y1 <= drawn.shape[0] + 3


def test_every_kind_of_picture_is_taken():
    grey = picture(channels=1)
    expected = pixels(draw(np.repeat(grey, 3, axis=2)))
    kinds = [
        grey,
        grey[:, :, 0],
        grey[:, :, 0].astype(np.int64),
        torch.from_numpy(grey[:, :, 0]),
        grey[:, :, 0].tolist(),
    ]
    kinds += [
        torch.from_numpy(grey).permute(2, 0, 1),
        grey / 255,
        (grey / 255).astype(np.float32),
        grey.astype(np.float32) / 255,
    ]
    kinds += [torch.from_numpy(grey / 255).permute(2, 0, 1).requires_grad_()]
    for kind in kinds:
        assert np.array_equal(pixels(draw(kind)), expected)
    colour = picture()
    assert np.array_equal(pixels(draw(colour[:, :, ::-1], channel_order="bgr")), pixels(draw(colour)))
    assert np.array_equal(pixels(draw(np.dstack([colour, grey]))), pixels(draw(colour)))
    assert np.array_equal(pixels(draw(grey > 100)), pixels(draw((grey > 100).astype(np.uint8) * 255)))
    draw(torch.full((3, 4, 4), torch.nan, dtype=torch.bfloat16))


@pytest.mark.parametrize("nothing", [None, [], np.zeros((0, 4)), torch.zeros(0, 4), torch.zeros(0)])
def test_nothing_found_is_the_picture_itself(nothing):
    image = picture()
    assert np.array_equal(pixels(draw(image, nothing)), pixels(draw(image)))
    if nothing is not None:
        assert np.array_equal(pixels(draw(image, nothing, [], [], [])), pixels(draw(image)))


def test_what_is_given_is_left_as_it_is():
    image, boxes, scores, masks = picture(), np.array([[-1.0, 2, 30, 90]]), np.array([0.5]), np.ones((1, 32, 40), bool)
    copies = [array.copy() for array in (image, boxes, scores, masks)]
    draw(image, boxes, [0], scores, masks, channel_order="bgr")
    for array, copy in zip((image, boxes, scores, masks), copies, strict=True):
        assert np.array_equal(array, copy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((4, 4, 2)),), ValueError, r"shape \(4, 4, 2\)"),
        ((torch.zeros(5, 4, 3),), ValueError, r"shape \(5, 4, 3\); .* a tensor \(H, W\) or"),
        ((np.zeros((0, 4)),), ValueError, r"shape \(0, 4\)"),
        ((np.array([["a"]]),), TypeError, "has to be bool, integers of 0..255, or floats"),
        ((picture(), [[1, 2, 3]]), ValueError, r"boxes have shape \(1, 3\)"),
        ((picture(), [1, 2, 3, 4]), ValueError, r"boxes have shape \(4,\)"),
        ((picture(), [[1, 2, 3, 4]], [1, 2]), ValueError, "1 boxes, 2 labels"),
        ((picture(), [[1, 2, 3, 4]], None, [0.1, 0.2]), ValueError, "1 boxes, 2 scores"),
        (
            (picture(), None, None, None, np.ones((1, 40, 32))),
            ValueError,
            r"masks have shape \(1, 40, 32\).*\(N, 32, 40\)",
        ),
        ((picture(), None, None, None, np.full((1, 32, 40), 0.2)), ValueError, "Choose a threshold: masks > 0.5"),
        ((picture(), None, None, None, torch.rand(1, 32, 40).bfloat16()), ValueError, "Choose a threshold"),
    ],
)
def test_what_does_not_belong_together_is_told(arguments, error, message):
    with pytest.raises(error, match=message):
        draw(*arguments)


def test_a_grid_has_each_picture_with_its_own_detections():
    founds = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([k]), "extra": 0} for k in range(5)]
    figure = draw_grid([picture()] * 5, founds, classes=list("abcde"))
    assert [texts_of.texts[0].get_text() for texts_of in figure.axes[:5]] == list("abcde")
    assert len(figure.axes) == 6
    assert pixels(figure).shape == (512, 960, 3)
    assert len(draw_grid([picture(), picture(64, 9)], [{}, {}], columns=9).axes) == 2
    with pytest.raises(ValueError, match="2 images and 1 dicts"):
        draw_grid([picture()] * 2, [{}])
    with pytest.raises(ValueError, match="channel_order is 'gbr'; it is 'rgb' or 'bgr'"):
        draw(picture(), channel_order="gbr")
    with pytest.raises(TypeError, match="knows no 'color'"):
        draw_grid([picture()], [{}], color=1)


def test_the_guides_pictures_and_hook_are_made(tmp_path, monkeypatch):
    pytest.importorskip("hotcoco")
    monkeypatch.chdir(tmp_path)
    guide = ROOT / "docs" / "vision.md"
    _, pictures, hook = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(pictures + hook, str(guide), "exec"), names)
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert texts(names["figure"]) == ["dog"] * 4
    assert type(names["hook"]).__name__ == "EvalTotalHook"


def test_drawing_imports_matplotlib_when_it_is_called_and_never_pyplot():
    code = """
import sys
import numpy as np
from torch_frame.vision import draw
assert "matplotlib" not in sys.modules
draw(np.zeros((8, 8)), [[1, 1, 5, 5]], [1]).savefig(sys.stdout.buffer, format="png")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x89PNG")
