"""Pictures, figures, texts and histograms: one form for all writers, as they are when they are added."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.small_runs import make_trainer
from torch_frame import LoggerHook
from torch_frame.tracking.media import Media


class Taker:
    def __init__(self) -> None:
        self.taken: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> None:
        self.taken.append((method, *args))


def opened() -> tuple[Media, Taker]:
    media, taker = Media(lambda: True, is_main=True), Taker()
    media.open([taker])
    return media, taker


RED = np.zeros((2, 5, 3), np.uint8)
RED[..., 0] = 255
PICTURES = {
    "hwc": RED,
    "chw": RED.transpose(2, 0, 1),
    "tensor": torch.from_numpy(RED).permute(2, 0, 1),
    "floats": torch.from_numpy(RED).permute(2, 0, 1) / 255,
    "half": (torch.from_numpy(RED).permute(2, 0, 1) / 255).bfloat16(),
    "with_a_gradient": (torch.from_numpy(RED).permute(2, 0, 1) / 255).requires_grad_(),
    "wide_integers": RED.astype(np.int64),
    "booleans": RED > 0,
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_picture_of_any_form_is_the_same_picture(picture: Any) -> None:
    media, taker = opened()
    media.image(3, "red", picture)
    ((kind, step, name, image),) = taker.taken
    assert (kind, step, name, image.dtype) == ("image", 3, "red", np.uint8)
    assert np.array_equal(image, RED)


def test_a_grey_picture_has_one_channel() -> None:
    media, taker = opened()
    for grey in (np.full((4, 6), 0.5), torch.full((1, 4, 6), 0.5)):
        media.image(0, "grey", grey)
    assert [image.shape for *_, image in taker.taken] == [(4, 6, 1)] * 2
    assert {int(image.max()) for *_, image in taker.taken} == {128}


@pytest.mark.parametrize(
    "bad",
    [torch.rand(8, 3, 4, 4), torch.rand(5), torch.rand(5, 4, 2), np.zeros((0, 4)), "picture", None, torch.tensor(1j)],
)
def test_what_is_no_picture_is_an_error_that_names_it(bad: Any) -> None:
    media, _ = opened()
    with pytest.raises(ValueError, match=r"add_image\('samples'"):
        media.image(0, "samples", bad)


def test_values_out_of_range_are_clipped_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    media, taker = opened()
    with caplog.at_level(logging.WARNING, "torch_frame"):
        for _ in range(2):
            media.image(0, "odd", np.array([[-1.0, 0.5], [2.0, np.nan]]))
    assert taker.taken[0][3][..., 0].tolist() == [[0, 128], [255, 0]]
    assert len(caplog.messages) == 1


def test_what_is_added_is_as_it_was_then() -> None:
    media, taker = opened()
    picture, weights = np.zeros((2, 2), np.uint8), torch.ones(3)
    media.image(0, "picture", picture)
    media.histogram(0, "weights", weights)
    picture += 9
    weights.zero_()
    assert taker.taken[0][3].max() == 0
    assert taker.taken[1][3].tolist() == [1.0, 1.0, 1.0]


def test_histograms_take_parameters_lists_and_arrays() -> None:
    media, taker = opened()
    for values in (
        nn.Parameter(torch.tensor([1.0, 2.0])),
        [1, 2],
        np.array([[1], [2]], np.int16),
        [torch.tensor([1.0, 2.0])],
    ):
        media.histogram(0, "h", values)
    assert [values.tolist() for *_, values in taker.taken] == [[1.0, 2.0]] * 4


@pytest.mark.parametrize("bad", ["text", [[1, 2], [3]], None, torch.tensor([1j])])
def test_what_is_no_histogram_is_an_error_that_names_it(bad: Any) -> None:
    media, _ = opened()
    with pytest.raises(ValueError, match=r"add_histogram\('h'"):
        media.histogram(0, "h", bad)


def test_infinite_values_of_a_histogram_are_told(caplog: pytest.LogCaptureFixture) -> None:
    media, taker = opened()
    with caplog.at_level(logging.WARNING, "torch_frame"):
        media.histogram(0, "h", [1.0, np.inf, np.nan])
        media.histogram(0, "empty", [])
    assert taker.taken[0][3].tolist() == [1.0]
    assert [("2 values" in line, "'empty'" in line) for line in caplog.messages] == [(True, False), (False, True)]


def test_figures_are_drawn_and_closed() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    media, taker = opened()
    figure = pyplot.figure(figsize=(2, 1), dpi=50)
    figure.gca().plot([0, 1])
    media.figure(0, "plot", figure)
    assert taker.taken[0][3].shape == (50, 100, 4)
    assert not pyplot.fignum_exists(figure.number)
    with pytest.raises(TypeError, match="Figure"):
        media.figure(0, "plot", "no figure")


def test_what_comes_before_the_writers_waits_for_them() -> None:
    media, taker = Media(lambda: True, is_main=True), Taker()
    media.text(0, "note", "early")
    media.open([taker])
    assert taker.taken == [("text", 0, "note", "early")]


def test_other_ranks_give_nothing() -> None:
    media, taker = Media(lambda: True, is_main=False), Taker()
    media.open([taker])
    media.image(0, "a", np.zeros((2, 2)))
    media.text(0, "a", "b")
    assert taker.taken == []


def test_without_a_logger_hook_it_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.WARNING, "torch_frame"):
        for _ in range(2):
            trainer.add_text("note", "nobody reads it")
    assert ["nothing takes it" in line for line in caplog.messages] == [True]


def test_what_comes_after_the_run_is_told_and_waits_for_another_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, hooks=[LoggerHook(progress_bar=False)])
    trainer.add_text("before", "waits")
    trainer.train()
    told = "the run has ended and its writers are closed"
    assert told not in caplog.text
    with caplog.at_level(logging.WARNING, "torch_frame"):
        for number in range(2):
            trainer.add_text("after", f"text {number}")
    assert [told in line for line in caplog.messages if "add_text" in line] == [True]
    trainer.max_epochs = 2
    trainer.train()
    events = EventAccumulator(trainer.tb_log_dir, size_guidance={"tensors": 0})
    events.Reload()
    texts = [event.tensor_proto.string_val[0] for event in events.Tensors("after/text_summary")]
    assert texts == [b"text 0", b"text 1"]


def test_more_than_can_wait_is_told_as_that(caplog: pytest.LogCaptureFixture) -> None:
    media, taker = Media(lambda: True, is_main=True), Taker()
    for number in range(103):
        media.text(number, "note", "early")
    media.open([taker])
    assert len(taker.taken) == 100
    assert [line for line in caplog.messages if "left out" in line and "LoggerHook" not in line] == caplog.messages
    assert len(caplog.messages) == 1
