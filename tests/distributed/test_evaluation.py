"""Evaluations on several processes: the values of one process, and ranks that wait for one that evaluates alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.distributed.processes import Failed, on_processes, outcomes
from tests.metrics.coco_reference import pycocotools_code
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook, EarlyStoppingHook, EvalHook, EvalTotalHook, HookBase
from torch_frame.distributed.ddp import DDP
from torch_frame.metrics import MeanAveragePrecision, Metric

NUM_IMAGES = 101


class Images(torch.utils.data.Dataset[Any]):
    """(id, prediction, truth) of random boxes; scores have many ties."""

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        truth = self._boxes(3, generator)
        noise = torch.randn(3, 4, generator=generator) * 4
        boxes = torch.cat([truth + noise, self._boxes(4, generator)])
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.randint(1, 6, (7,), generator=generator) / 5
        labels = torch.randint(0, 2, (7,), generator=generator)
        return index, {"boxes": boxes, "scores": scores, "labels": labels}, {"boxes": truth, "labels": labels[:3]}

    def _boxes(self, num: int, generator: torch.Generator) -> Tensor:
        corners = torch.rand(num, 2, generator=generator) * 80
        return torch.cat([corners, corners + 10 + 40 * torch.rand(num, 2, generator=generator)], 1)


class Counts:
    """Counts and float sums of what it has seen."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.count, self.sum = 0, 0.0

    def update(self, preds: Any) -> None:
        self.count += len(preds)
        self.sum += float(sum(pred["scores"].sum() for pred in preds))

    def merge(self, other: Counts) -> None:
        self.count, self.sum = self.count + other.count, self.sum + other.sum

    def compute(self) -> dict[str, float]:
        return {"count": self.count, "sum": self.sum}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.sum = state["count"], state["sum"]


def collate(samples: list[Any]) -> list[Any]:
    return samples


def split(batch: Any) -> tuple[list[int], list[Any], list[Any]]:
    ids, preds, targets = zip(*batch, strict=True)
    return list(ids), list(preds), list(targets)


def with_masks(batch: Any) -> tuple[list[int], list[Any], list[Any]]:
    """The batch with the boxes' pixels as masks, of images of many sizes; truth as run-length codes."""
    ids, preds, targets = split(batch)
    for image, sides in enumerate(zip(preds, targets, strict=True)):
        for entry in sides:
            y, x = torch.meshgrid(torch.arange(140 + ids[image] % 7), torch.arange(150), indexing="ij")
            left, top, right, bottom = entry["boxes"][:, :, None, None].unbind(1)
            entry["masks"] = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    targets = [entry | {"masks": [pycocotools_code(mask) for mask in entry["masks"].numpy()]} for entry in targets]
    return ids, preds, targets


def score_means(model: Any, batch: Any) -> dict[str, list[float]]:
    return {"score": [float(pred["scores"].mean()) for _, pred, _ in batch]}


def evaluate(folder: Path, batch_size: int = 4) -> dict[str, Any]:
    loader = DataLoader(Images(), batch_size, collate_fn=collate)
    quiet = {"progress_bar": False}
    hooks = [
        EvalTotalHook(
            loader,
            MeanAveragePrecision(["a", "b"]),
            save_metric="map",
            inputs=lambda model, batch: split(batch),
            **quiet,
        ),
        EvalTotalHook(
            loader,
            {"box": MeanAveragePrecision(["a", "b"]), "mask": MeanAveragePrecision(["a", "b"], iou_type="segm")},
            prefix="both",
            inputs=lambda model, batch: with_masks(batch),
            **quiet,
        ),
        EvalTotalHook(loader, Counts(), prefix="num", inputs=lambda model, batch: split(batch)[1], **quiet),
        EvalHook(loader, score_means, prefix="mean", **quiet),
        EvalHook(list(loader), score_means, prefix="list", **quiet),
    ]
    net = DataLoader(TensorDataset(torch.ones(8, 3), torch.ones(8, 1)), 2)
    trainer = make_trainer(folder, data=net, hooks=hooks, max_epochs=1)
    trainer.train(5, 5)
    values = trainer.evaluate()
    assert all(trainer.metric_storage[name].latest == value for name, value in values.items() if value == value)
    assert hooks[0].cur_best == values["eval_map"]
    return values


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_values_are_those_of_one_process(world_size: int, tmp_path: Path) -> None:
    assert isinstance(Counts(), Metric)
    expected = evaluate(tmp_path / "one")
    assert 0.05 < expected["eval_map"] < 0.95
    assert expected["both_box_map"] == expected["eval_map"]
    assert 0.05 < expected["both_mask_map"] < 0.95
    assert expected["both_mask_map"] != expected["eval_map"]
    assert expected["num_count"] == NUM_IMAGES
    for result in on_processes(evaluate, tmp_path, world_size, tmp_path / "ranks"):
        for name, value in expected.items():
            if name == "num_sum":
                assert result[name] == pytest.approx(value, rel=1e-6)
            else:
                assert result[name] == value or value != value, name


class Seen(Counts):
    """Which images were evaluated, and on which rank."""

    def reset(self) -> None:
        self.images: list[list[int]] = []

    def update(self, ids: Any) -> None:
        self.images += [[int(image), torch.distributed.get_rank()] for image in ids]

    def merge(self, other: Any) -> None:
        self.images = self.images + other.images

    def compute(self) -> dict[str, float]:
        ids = [image for image, _ in self.images]
        ranks = {rank for _, rank in self.images}
        return {"count": len(ids), "distinct": len(set(ids)), "last": max(ids), "ranks": len(ranks)}

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images = state["images"]


def listed_images() -> Any:
    """A metric of torchmetrics that keeps a list, which torchmetrics exchanges entry by entry."""
    torchmetrics = pytest.importorskip("torchmetrics")

    class Listed(torchmetrics.Metric):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.add_state("images", default=[], dist_reduce_fx=None)

        def update(self, ids: Tensor) -> None:
            self.images.extend(ids.unbind())

        def compute(self) -> dict[str, Tensor]:
            return {"count": torch.tensor(len(self.images)), "sum": torch.stack(self.images).sum()}

    return Listed()


def count_images(folder: Path, sizes: list[int]) -> dict[str, dict[str, float]]:
    """Evaluate all images of sets of several sizes, in training and by `evaluate()`."""
    values: dict[str, dict[str, float]] = {}
    for size in sizes:
        data = TensorDataset(torch.arange(size))
        loaders: dict[str, Any] = {
            "whole": DataLoader(data, 1),
            "pairs": DataLoader(data, 2, shuffle=True),
            "padded": DataLoader(data, 1, sampler=DistributedSampler(data)),  # which alone would repeat some
            "list": [[batch] for batch in torch.arange(size).split(1)],
        }
        hooks: list[HookBase] = [
            EvalTotalHook(loader, Seen(), prefix=name, inputs=lambda model, batch: batch[0], progress_bar=False)
            for name, loader in loaders.items()
        ]
        listed = listed_images()
        hooks.append(
            EvalTotalHook(
                loaders["whole"], listed, prefix="listed", inputs=lambda model, batch: batch[0], progress_bar=False
            )
        )
        trainer = make_trainer(folder / str(size), None, None, None, train_loader(), 1, hooks=hooks)
        trainer.train(5, 5)
        values[f"{size} in training"] = {n: b.latest for n, b in trainer.metric_storage.items() if "_" in n}
        values[f"{size} asked for"] = trainer.evaluate()
    return values


def train_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(16, 3), torch.ones(16, 1)), 1)


@pytest.mark.parametrize(
    ("world_size", "sizes"), [(2, [21, 1]), pytest.param(8, [5, 21, 8], marks=pytest.mark.slow)], ids=["2", "8"]
)
def test_no_image_counts_twice_or_not_at_all(world_size: int, sizes: list[int], tmp_path: Path) -> None:
    """21 images stay 21 on 2 ranks, 5 stay 5 on 8."""
    for result in on_processes(count_images, tmp_path, world_size, tmp_path, sizes, timeout_s=180.0):
        for size in sizes:
            for when in ("in training", "asked for"):
                values = result[f"{size} {when}"]
                assert (values["listed_count"], values["listed_sum"]) == (size, size * (size - 1) / 2)
                for name in ("whole", "pairs", "padded", "list"):
                    of_rank = -(-size // 2) if name == "pairs" else size
                    assert values[f"{name}_count"] == values[f"{name}_distinct"] == size
                    assert values[f"{name}_last"] == size - 1
                    assert values[f"{name}_ranks"] == min(of_rank, world_size), "all ranks work"


class Caching(Net):
    """Keeps what it has computed, as long as the data was, and counts in a buffer that is saved."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        size = 3 + 2 * torch.distributed.get_rank()
        self.register_buffer("scale", torch.tensor(1.0 + torch.distributed.get_rank()))
        self.register_buffer("cache", torch.zeros(size), persistent=persistent)
        if torch.distributed.get_rank() == 0:
            self.register_buffer("only_here", torch.zeros(1), persistent=False)


def evaluate_caching(folder: Path) -> Any:
    found: list[Any] = []
    for persistent in (False, True):
        model = Caching(persistent=persistent)
        hook = EvalHook(make_batches(3), lambda model, batch: {"scale": [model.scale]}, progress_bar=False)
        strategy = DDP()
        strategy.prepare = lambda model: model  # type: ignore[method-assign]  # as one that does not share buffers
        trainer = make_trainer(folder, model, None, None, train_loader(), 1, hooks=[hook], strategy=strategy)
        try:
            found.append((trainer.evaluate(), len(model.cache), float(model.scale)))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_buffers_of_another_size_are_each_ranks_own_or_told(tmp_path: Path) -> None:
    (first, first_told), (second, second_told) = on_processes(evaluate_caching, tmp_path, 2, tmp_path)
    assert first == ({"eval_scale": 1.0}, 3, 1.0)
    assert second == ({"eval_scale": 1.0}, 5, 2.0), "rank 0's scale, while it evaluates"
    assert "SettingError: The buffer 'cache' has shape (3,) on rank 0 and (5,) on rank 1" in second_told
    assert "RanksError" in first_told


# ---------------------------------------------------------------- hooks on rank 0 alone


class NormNet(Net):
    def __init__(self) -> None:
        super().__init__(norm=True)


def slow_scores(model: Any, batch: Any) -> dict[str, Tensor]:
    time.sleep(0.9)
    return {"error": (model.predict(batch[0]) - batch[1]).abs().flatten()}


def train_alone(folder: Path) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    hooks: list[HookBase] = []
    if rank == 0:
        evaluation = EvalHook(make_batches(4), slow_scores, save_metric="error", max_first=False, progress_bar=False)
        hooks = [
            evaluation,
            WholeState(),
            EarlyStoppingHook("eval_error", patience=1, max_first=False, min_delta=100.0),
        ]
    model = NormNet()
    data = DataLoader(TensorDataset(torch.randn(12, 3), torch.randn(12, 1)), 2)
    trainer = make_trainer(folder / "run", model, None, None, data, 5, hooks=hooks, create_new_dir=None)
    trainer.train(5, 5)
    return {
        "epochs": trainer.progress.epoch,
        "files": sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()),
    }


class WholeState(HookBase):
    """Saves as hooks of 1.7 do, there and then."""

    def after_epoch(self) -> None:
        self.trainer.save_checkpoint("mine.pth")
        self.trainer.save_checkpoint("state.pth", save_single_model=False)


def train_alone_by_batches(folder: Path) -> int:
    """Evaluate for 2.7 s behind the third batch."""
    settings: Any = {"period": 3, "period_unit": "iter", "progress_bar": False}
    hooks = [EvalHook(make_batches(3), slow_scores, **settings)] if torch.distributed.get_rank() == 0 else []
    data = DataLoader(TensorDataset(torch.randn(20, 3), torch.randn(20, 1)), 2)
    trainer = make_trainer(folder / "batches", Net(), None, None, data, max_iters=4, hooks=hooks)
    trainer.train(5, 5)
    return trainer.progress.iter


def train_both(folder: Path) -> Any:
    return train_alone(folder), train_alone_by_batches(folder)


@pytest.mark.slow
def test_ranks_wait_for_rank_0_for_longer_than_the_time_out_and_end_with_it(tmp_path: Path) -> None:
    """The evaluations take 3.6 s behind an epoch and 2.7 s behind a batch, the group's time-out is 2 s."""
    results = on_processes(train_both, tmp_path, 2, tmp_path, group_timeout_s=2.0)
    files = ["best.pth", "latest.pth", "mine.pth", "previous.pth", "state.pth"]
    assert results == [({"epochs": 2, "files": files}, 4)] * 2


# ---------------------------------------------------------------- what differs between ranks


class Calls(HookBase):
    """Does something that concerns all ranks, on rank 1 only."""

    def __init__(self, what: str) -> None:
        self.what = what

    def after_epoch(self) -> None:
        if self.trainer.strategy.rank == 1 and self.what == "saves":
            self.trainer.save_checkpoint("state.pth", save_single_model=False)
        if self.trainer.strategy.rank == 1 and self.what == "fails":
            raise ValueError("as a user's code fails")


def train_with(folder: Path, what: str) -> None:
    rank = torch.distributed.get_rank()
    hooks: Any = {
        "other hooks": [CheckpointerHook()] if rank == 0 else None,
        "saves": [Calls("saves")],
        "fails": [Calls("fails")],
        "lengths": [],
    }[what]
    data: Any = DataLoader(TensorDataset(torch.randn(12, 3), torch.randn(12, 1)), 2)
    settings: dict[str, Any] = {}
    if what == "lengths":
        data, settings = make_batches(3 + rank), {"strategy": DDP(own_shards=True)}
    make_trainer(folder / "run", Net(), None, None, data, 2, hooks=hooks, **settings).train(5, 5)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("other hooks", r"rank 0 \[CheckpointerHook\]; rank 1 \[CheckpointerHook, LoggerHook\]"),
        ("saves", r"rank 0 does 'agree', rank 1 does 'gather'"),
        ("lengths", r"batches in an epoch: 3, 4"),
    ],
)
def test_ranks_that_do_different_things_are_told_and_do_not_hang(what: str, words: str, tmp_path: Path) -> None:
    for result in outcomes(train_with, tmp_path, 2, tmp_path, what):
        with pytest.raises(Failed, match=words):
            raise result


def test_an_error_on_one_rank_ends_the_others_at_once_with_its_words(tmp_path: Path) -> None:
    started = time.monotonic()
    first, second = outcomes(train_with, tmp_path, 2, tmp_path, "fails")
    assert time.monotonic() - started < 20, "long before the time-out of 60 s"
    assert (second.kind, second.message) == ("ValueError", "as a user's code fails")
    assert first.kind == "RanksError"
    assert "rank 1: ValueError: as a user's code fails" in first.message + "".join(first.notes)
