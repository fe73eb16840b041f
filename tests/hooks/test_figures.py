"""Figures of an evaluation reach TensorBoard, once for each evaluation, and never stop training silently."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.processes import on_processes
from tests.small_runs import make_trainer, run_python
from torch_frame import EvalTotalHook, LoggerHook, Trainer
from torch_frame.metrics import MeanAveragePrecision
from torch_frame.report.precision_recall import plot_precision_recall
from torch_frame.vision import draw

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
TRUTH = {"boxes": BOX, "labels": torch.tensor([0])}
FOUND = TRUTH | {"scores": torch.tensor([0.9])}
LOADER = [(["a"], [TRUTH]), (["b"], [TRUTH])]


def evaluation(**settings: Any) -> EvalTotalHook:
    return EvalTotalHook(
        LOADER,
        MeanAveragePrecision(["cat", "dog"]),
        save_metric="map",
        inputs=lambda model, batch: (batch[0], [FOUND], batch[1]),
        progress_bar=False,
        **settings,
    )


def train(folder: Path, *hooks: Any, max_epochs: int = 2, **settings: Any) -> Trainer:
    trainer = make_trainer(folder, max_epochs=max_epochs, hooks=list(hooks), **settings)
    trainer.train(5, 5)
    return trainer


def images_of(trainer: Trainer) -> dict[str, list[int]]:
    """tag -> the steps of its images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(trainer.tb_log_dir, size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_a_figure_stands_with_the_values_of_its_own_loader(tmp_path: Path) -> None:
    hook = EvalTotalHook(
        {"val": LOADER, "val_ood": LOADER},
        MeanAveragePrecision(["cat", "dog"]),
        inputs=lambda model, batch: (batch[0], [FOUND], batch[1]),
        progress_bar=False,
        figures={"curves": plot_precision_recall},
    )
    trainer = train(tmp_path, hook, LoggerHook(progress_bar=False), max_epochs=1)
    assert images_of(trainer) == {"val/val_curves": [0], "val_ood/val_ood_curves": [0]}


def test_tensorboard_gets_the_figure_of_each_evaluation(tmp_path: Path) -> None:
    hook = evaluation(figures={"curves": plot_precision_recall})
    trainer = train(tmp_path, hook, LoggerHook(progress_bar=False), max_epochs=3)
    assert images_of(trainer) == {"eval/eval_curves": [0, 1, 2]}
    assert list(hook.pictures) == ["eval_curves"]
    assert hook.pictures["eval_curves"].axes[0].get_legend().get_title().get_text() == "AP, mean 1.000"


def test_a_figure_is_in_the_group_of_its_own_loader(tmp_path: Path) -> None:
    hook = EvalTotalHook(
        {"val": LOADER, "val_ood": LOADER},
        MeanAveragePrecision(["cat", "dog"]),
        inputs=lambda model, batch: (batch[0], [FOUND], batch[1]),
        figures={"curves": plot_precision_recall},
        progress_bar=False,
    )
    trainer = train(tmp_path, hook, LoggerHook(progress_bar=False), max_epochs=1)
    assert images_of(trainer) == {"val/val_curves": [0], "val_ood/val_ood_curves": [0]}


def test_the_image_is_the_figure_pixel_by_pixel(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    seen: list[int] = []

    def as_it_is(metric: MeanAveragePrecision) -> Figure:
        seen.append(metric.num_images)
        figure = Figure(figsize=(0.3, 0.2), dpi=100)
        figure.figimage(levels)
        return figure

    trainer = train(tmp_path, evaluation(figures={"levels": as_it_is}), LoggerHook(progress_bar=False), max_epochs=1)
    assert seen == [1, 2]  # tried on one batch before the first step
    events = EventAccumulator(trainer.tb_log_dir)
    events.Reload()
    (image,) = events.Images("eval/eval_levels")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))[..., :3], levels)


def test_a_resumed_run_has_each_image_once(tmp_path: Path) -> None:
    def hooks() -> list[Any]:
        return [evaluation(figures={"curves": plot_precision_recall}), LoggerHook(progress_bar=False)]

    train(tmp_path / "run", *hooks(), max_epochs=2)
    resumed = make_trainer(tmp_path / "run", max_epochs=4, hooks=hooks())
    resumed.load_checkpoint("latest.pth")
    resumed.train(5, 5)
    assert images_of(resumed) == {"eval/eval_curves": [0, 1, 2, 3]}


def test_a_figure_that_no_writer_takes_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook = evaluation(figures={"curves": plot_precision_recall})
    with caplog.at_level(logging.WARNING, "torch_frame"):
        train(tmp_path, hook)
    told = [record.message for record in caplog.records if "eval_curves" in record.message]
    assert len(told) == 1
    assert "no LoggerHook is registered" in told[0]
    assert "eval_curves" in hook.pictures


def test_a_function_may_have_nothing_to_show_but_nothing_else_than_a_figure(tmp_path: Path) -> None:
    hook = evaluation(figures={"none": lambda metric: None})
    train(tmp_path / "none", hook)
    assert hook.pictures == {}
    with pytest.raises(TypeError, match="figure 'text' returned str; it has to return a matplotlib figure"):
        train(tmp_path / "text", evaluation(figures={"text": lambda metric: "curves"}))
    for wrong in (plot_precision_recall, {"curves": 3}, ["curves"]):
        with pytest.raises(TypeError, match="figures of EvalTotalHook is"):
            evaluation(figures=wrong)


def test_a_wrong_function_is_told_before_the_first_step(tmp_path: Path) -> None:
    def broken(metric: Any) -> Any:
        raise ZeroDivisionError("in my figure")

    steps: list[Any] = []
    with pytest.raises(ZeroDivisionError, match="in my figure"):
        train(tmp_path, evaluation(figures={"broken": broken}), step_fn=lambda model, batch: steps.append(1))
    assert not steps


def test_only_what_an_evaluation_has_drawn_is_written(tmp_path: Path) -> None:
    calls: list[int] = []

    def every_other(metric: MeanAveragePrecision) -> Any:
        calls.append(metric.num_images)
        return plot_precision_recall(metric) if len(calls) % 2 else None

    trainer = train(tmp_path, evaluation(figures={"curves": every_other}), LoggerHook(progress_bar=False), max_epochs=4)
    assert calls == [1, 2, 2, 2, 2]  # the first one tries it on one batch
    assert images_of(trainer) == {"eval/eval_curves": [1, 3]}


def test_a_function_may_run_the_model_to_draw_what_it_finds(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def found(metric: MeanAveragePrecision) -> Any:
        model = trainer.model_evaluate
        seen.append((model.training, torch.is_grad_enabled()))
        width = float(model.predict(torch.ones(1, 3)).abs())
        torch.rand(1)
        return draw(np.zeros((32, 32), np.uint8), [[0, 0, 8 + width, 20]], ["cat"], [0.9])

    plain = train(tmp_path / "plain", evaluation(), LoggerHook(progress_bar=False))
    trainer = make_trainer(
        tmp_path / "drawn", max_epochs=2, hooks=[evaluation(figures={"found": found}), LoggerHook(progress_bar=False)]
    )
    trainer.train(5, 5)
    assert images_of(trainer) == {"eval/eval_found": [0, 1]}
    assert seen == [(False, False)] * 3
    assert trainer.model.training
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_by_hand_draws_and_writes_nothing(tmp_path: Path) -> None:
    hook = evaluation(figures={"curves": plot_precision_recall})
    trainer = train(tmp_path, hook, LoggerHook(progress_bar=False), max_epochs=1)
    first = hook.pictures["eval_curves"]
    trainer.evaluate()
    assert hook.pictures["eval_curves"] is not first
    assert images_of(trainer) == {"eval/eval_curves": [0]}


def test_figures_are_in_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Mine(EvalTotalHook):
        """A subclass: its changed attributes are saved."""

    hook = Mine(
        LOADER, MeanAveragePrecision(["cat", "dog"]), progress_bar=False, figures={"curves": plot_precision_recall},
        inputs=lambda model, batch: (batch[0], [FOUND], batch[1]),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "torch_frame"):
        trainer = train(tmp_path, hook, LoggerHook(progress_bar=False))
    assert not [record.message for record in caplog.records if "not in the checkpoint" in record.message]
    state = torch.load(Path(trainer.ckpt_dir) / "latest.pth", weights_only=True)
    assert "pictures" not in str(state["hooks"]["Mine"])


WITHOUT_MATPLOTLIB = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from pathlib import Path
from torch_frame import EvalTotalHook
from torch_frame.errors import SettingError
from torch_frame.metrics import MeanAveragePrecision
from torch_frame.report.precision_recall import plot_precision_recall
from tests.small_runs import make_trainer

def train(**settings):
    metric, inputs = MeanAveragePrecision(["a"]), lambda model, batch: ([batch], [], [])
    make_trainer(Path("run"), hooks=[EvalTotalHook([1], metric, inputs=inputs, **settings)]).train(5, 5)

try:
    train(figures={"curves": plot_precision_recall})
except SettingError as error:
    print(error)
"""


def test_without_matplotlib_figures_are_refused_before_the_first_step(tmp_path: Path) -> None:
    result = run_python(WITHOUT_MATPLOTLIB, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "figures of EvalTotalHook need matplotlib, which is not installed. Run: pip install" in result.stdout
    assert not list(tmp_path.rglob("*.pth"))


def on_two_ranks(folder: Path) -> tuple[list[str], dict[str, list[int]] | None]:
    hook = evaluation(figures={"curves": plot_precision_recall})
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), 2)
    trainer = train(folder, hook, LoggerHook(progress_bar=False), data=data)
    return list(hook.pictures), images_of(trainer)


def test_on_two_ranks_rank_0_draws_the_merged_metric(tmp_path: Path) -> None:
    first, second = on_processes(on_two_ranks, tmp_path, 2, tmp_path / "run")
    assert first == (["eval_curves"], {"eval/eval_curves": [0, 1]})
    assert second[0] == []
