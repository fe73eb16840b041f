"""Trains a small anchor-free detector from scratch, on handwritten digits pasted on canvases, in about 2 minutes on a CPU.

    pip install "torch-frame[detection,report,demo]"
    python examples/detection.py
    python examples/detection.py --resume     # goes on where an interrupted run with the same options stood
    torchrun --nproc-per-node 2 examples/detection.py         # two processes, which share each batch

The canvases are made when the script starts, the same each time: of scikit-learn's 1,797 digits every fifth one is held out and
stands on the canvases for validation only. COCO's mean average precision of the averaged weights is taken after each epoch;
`best.pth` follows it. Mosaic and warps are off in the last epochs. The run's folder gets a picture of what the detector finds.
"""

import argparse
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_frame import EvalTotalHook, LoggerHook, Trainer, set_random_seed
from torch_frame.metrics import MeanAveragePrecision
from torch_frame.report.precision_recall import plot_precision_recall
from torch_frame.vision import adjust_brightness, batched_nms, box_iou, draw_grid, mosaic, random_perspective

SIZE = 96
"""Height and width of a canvas, in pixels."""

STRIDE = 8
"""Pixels between two places that the detector looks at."""

CLASSES = [str(digit) for digit in range(10)]
MAX_BOXES = 64
"""Boxes of a training picture at most; a mosaic of four crowded canvases has up to 52, and shows about a quarter of them."""

Canvas = tuple[np.ndarray, np.ndarray]
"""(SIZE, SIZE) uint8, and (n, 5) float32 rows: class, x1, y1, x2, y2 in pixels."""


# ---------------------------------------------------------------- data


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(images (n, 8, 8) float32 of 0..1, labels (n,)) for training, and of the digits that are held out."""
    from sklearn import datasets

    data = datasets.load_digits()
    images, labels = data.images.astype(np.float32) / 16, data.target
    held_out = np.arange(len(labels)) % 5 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def make_canvas(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray) -> Canvas:
    """Digits of many sizes on a shaded, noisy ground: some canvases are crowded, some empty."""
    kind = rng.choice(["empty", "crowded", "plain"], p=[0.1, 0.2, 0.7])
    num_wanted = {"empty": 0, "crowded": rng.integers(9, 14), "plain": rng.integers(1, 7)}[str(kind)]
    shades = torch.from_numpy(rng.uniform(0, 90, (1, 1, 3, 3)).astype(np.float32))
    canvas = F.interpolate(shades, (SIZE, SIZE), mode="bilinear")[0, 0].numpy()
    rows = np.empty((0, 5), np.float32)
    for _ in range(8 * num_wanted):
        if len(rows) == num_wanted:
            break
        chosen, side = rng.integers(len(labels)), rng.uniform(18, 24 if kind == "crowded" else 40)
        height, width = int(side * rng.uniform(0.9, 1.1)), int(side * rng.uniform(0.9, 1.1))
        digit = torch.from_numpy(images[chosen])[None, None]
        ink = F.interpolate(digit, (height, width), mode="bicubic").clamp(0, 1)[0, 0].numpy()
        left, top = rng.integers(0, SIZE - width), rng.integers(0, SIZE - height)
        ys, xs = np.nonzero(ink > 0.25)
        box = np.array([left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1], np.float32)
        if len(rows) and box_iou(box[None], rows[:, 1:]).max() > 0.05:
            continue
        part = canvas[top : top + height, left : left + width]
        part += ink * (rng.uniform(150, 255) - part)
        rows = np.concatenate([rows, np.append(np.float32(labels[chosen]), box)[None]])
    canvas = canvas + rng.normal(0, 8, canvas.shape)
    return canvas.clip(0, 255).astype(np.uint8), rows


def make_canvases(number: int, seed: int, digits: tuple[np.ndarray, np.ndarray]) -> list[Canvas]:
    return [make_canvas(np.random.default_rng([seed, index]), *digits) for index in range(number)]


class Augmented(Dataset):
    """Canvases for training: mosaics of four, warped and of another brightness; in the epochs from `plain_from` on as they are.

    What is drawn is a function of (seed, epoch, position), and whether there are mosaics of the epoch: so a resumed run has them.
    """

    def __init__(self, canvases: list[Canvas], plain_from: int) -> None:
        self.canvases, self.plain_from, self.epoch = canvases, plain_from, 0

    def __len__(self) -> int:
        return len(self.canvases)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(1, SIZE, SIZE) uint8, and (MAX_BOXES, 5) rows; those of class -1 only fill up."""
        image, rows = self.canvases[index]
        if self.epoch < self.plain_from:
            if random.random() < 0.7:
                others = [self.canvases[random.randrange(len(self))] for _ in range(3)]
                image, rows = mosaic([(image, rows), *others], (SIZE, SIZE))
            border = [(SIZE - side) // 2 for side in image.shape]
            warp = {"angle": 8, "translate": 0.2, "scale": (0.8, 1.3), "border": border, "wh_thr": 5, "area_thr": 0.5}
            image, rows = random_perspective(image, rows, fill_value=60, class_first=True, **warp)
        image = adjust_brightness(image, random.uniform(-40, 40))
        filled = torch.full((MAX_BOXES, 5), -1.0)
        filled[: len(rows)] = torch.from_numpy(rows[:MAX_BOXES]).float()
        return torch.from_numpy(image)[None], filled


def for_evaluation(canvases: list[Canvas], batch_size: int) -> list[dict]:
    """Batches of `ids`, `images` (B, 1, SIZE, SIZE) and `targets`, as MeanAveragePrecision takes them."""
    images = torch.from_numpy(np.stack([image for image, _ in canvases]))[:, None]
    rows = [torch.from_numpy(rows) for _, rows in canvases]
    targets = [{"boxes": one[:, 1:], "labels": one[:, 0].long()} for one in rows]
    parts = [slice(start, start + batch_size) for start in range(0, len(canvases), batch_size)]
    return [
        {"ids": list(range(len(canvases)))[part], "images": images[part], "targets": targets[part]} for part in parts
    ]


# ---------------------------------------------------------------- model


class Conv(nn.Sequential):
    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(Conv(channels, channels), Conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


class Detector(nn.Module):
    """(B, 1, H, W) uint8 -> class logits (B, P, 10) and boxes (B, P, 4) xyxy at P places, one for each STRIDE x STRIDE pixels.

    Each place says how far the four sides of the box around it are (FCOS, Tian et al. 2019), so there are no anchors.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            Conv(1, width // 4, 2),
            Conv(width // 4, width // 2, 2),
            Residual(width // 2),
            Conv(width // 2, width, 2),
            Residual(width),
            Residual(width),
        )
        self.class_head = nn.Sequential(Conv(width, width), nn.Conv2d(width, len(CLASSES), 3, padding=1))
        self.side_head = nn.Sequential(Conv(width, width), nn.Conv2d(width, 4, 3, padding=1))
        nn.init.constant_(self.class_head[-1].bias, -4.0)  # nearly all places are ground

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images / 128 - 1)
        logits = self.class_head(features).flatten(2).mT
        sides = self.side_head(features).flatten(2).mT.clamp(max=4).exp() * STRIDE
        centres = places(*features.shape[-2:], features.device)
        return logits, torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], dim=-1)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 2) x, y of the places, in pixels."""
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return (torch.stack([x, y], dim=-1).reshape(-1, 2) + 0.5) * STRIDE


def assigned(targets: Tensor, centres: Tensor) -> Tensor:
    """Which box each place answers for: that whose middle is near, the smallest if there are several; -1: none.

    Args:
        targets: (B, MAX_BOXES, 5). centres: (P, 2).

    Returns:
        (B, P) index of a row of the targets.
    """
    sizes = targets[:, :, 3:] - targets[:, :, 1:3]
    middles = targets[:, :, 1:3] + sizes / 2
    offsets = (centres[:, None] - middles[:, None]).abs()  # (B, P, MAX_BOXES, 2)
    near = (offsets < (sizes[:, None] / 2).clamp(max=1.5 * STRIDE)).all(dim=-1)
    distance = offsets.square().sum(dim=-1)
    near |= distance == distance.amin(dim=1, keepdim=True)  # each box has a place
    near &= targets[:, None, :, 0] >= 0
    areas = sizes.prod(dim=-1)[:, None].expand_as(near).masked_fill(~near, torch.inf)
    smallest, index = areas.min(dim=-1)
    return index.masked_fill(smallest.isinf(), -1)


def train_step(model: nn.Module, batch: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses: GIoU of the boxes; focal loss of the class scores, which learn how well the box fits (Li et al. 2020)."""
    images, targets = batch
    logits, boxes = model(images)
    rows, columns = (side // STRIDE for side in images.shape[-2:])
    owners = assigned(targets, places(rows, columns, images.device))
    image, place = torch.nonzero(owners >= 0, as_tuple=True)
    truth = targets[image, owners[image, place]]
    number = max(len(truth), 1)
    fits = box_iou(boxes[image, place], truth[:, 1:], paired=True, mode="giou")
    with torch.no_grad():
        overlap = box_iou(boxes[image, place], truth[:, 1:], paired=True)
        wanted = torch.zeros_like(logits)
        wanted[image, place, truth[:, 0].long()] = overlap
    away = (logits.detach().sigmoid() - wanted).abs().square()
    classes = F.binary_cross_entropy_with_logits(logits, wanted, away, reduction="sum") / number
    return {"classes": classes, "boxes": 2 * (1 - fits).sum() / number}, {"iou": overlap.sum() / number}


def detect(
    model: nn.Module, images: Tensor, min_score: float = 0.02, max_overlap: float = 0.6
) -> list[dict[str, Tensor]]:
    """For each image its detections: `boxes` (n, 4) xyxy, `scores` (n,), `labels` (n,), best first."""
    logits, boxes = model(images)
    found = []
    for of_image, corners in zip(logits.sigmoid(), boxes, strict=True):
        place, label = torch.nonzero(of_image > min_score, as_tuple=True)
        scores, inside = of_image[place, label], corners[place].clamp(0, SIZE)
        kept = batched_nms(inside, scores, label, max_overlap)[:100]
        found.append({"boxes": inside[kept], "scores": scores[kept], "labels": label[kept]})
    return found


# ---------------------------------------------------------------- the run


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    set_random_seed(args.seed)
    started_s = time.perf_counter()

    for_training, held_out = load_digits()
    train_set = Augmented(make_canvases(args.canvases, 0, for_training), plain_from=args.epochs - args.epochs // 4)
    canvases = make_canvases(args.canvases // 4, 1, held_out)

    # Under torchrun each process takes its part of a batch, so that an update is made of as many canvases.
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    train_loader = DataLoader(train_set, args.batch_size // num_processes, shuffle=True)

    model = Detector().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    num_updates = args.epochs * -(-len(train_set) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.004, total_steps=num_updates)

    evaluation = EvalTotalHook(
        for_evaluation(canvases, batch_size=50),
        MeanAveragePrecision(CLASSES),
        save_metric="map",
        inputs=lambda model, batch: (batch["ids"], detect(model, batch["images"]), batch["targets"]),
        figures={"curves": plot_precision_recall},
    )
    trainer = Trainer(
        model,
        optimizer,
        schedule,
        train_loader,
        max_epochs=args.epochs,
        work_dir=args.work_dir,
        clip_grad_norm=10.0,
        hooks=[evaluation, LoggerHook()],
        use_ema=True,
        ema_decay=0.99,
        step_fn=train_step,
        lr_scheduler_interval="iter",
        resume="auto" if args.resume else None,
    )
    trainer.train()
    if not trainer.check_main():
        return
    final = {name: trainer.metric_storage[f"eval_{name}"].latest for name in ("map", "map_50")}
    best = torch.load(Path(trainer.ckpt_dir) / "best.pth", weights_only=True)
    picture = Path(trainer.work_dir) / "detections.png"
    save_picture(best, canvases, picture)
    print(f"mAP {final['map']:.4f}, AP50 {final['map_50']:.4f} at the end; mAP {evaluation.cur_best:.4f} at best.")
    print(f"It took {time.perf_counter() - started_s:.0f} s. Picture: {picture}")


def save_picture(weights: Mapping[str, Tensor], canvases: list[Canvas], path: Path) -> None:
    """What a detector finds on eight of the canvases, from an empty one to the most crowded."""
    by_number = sorted(canvases, key=lambda canvas: len(canvas[1]))
    chosen = [by_number[round(k * (len(by_number) - 1) / 7)][0] for k in range(8)]
    model = Detector()
    model.load_state_dict(weights)
    with torch.no_grad():
        found = detect(model.eval(), torch.from_numpy(np.stack(chosen))[:, None])
    draw_grid(chosen, found, columns=4, classes=CLASSES, min_score=0.3).savefig(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small detector on scikit-learn's digits.")
    parser.add_argument("--work-dir", default="work_dir/detection", help="where the run's files go")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="canvases in an update, of all processes together")
    parser.add_argument(
        "--canvases", type=int, default=1000, help="canvases to train on; a quarter as many are held out"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state of --work-dir")
    return parser.parse_args()


if __name__ == "__main__":
    main()
