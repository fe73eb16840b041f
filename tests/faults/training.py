"""A training script with all that makes exact resume hard, run as a process of its own. It can end, or signal, itself anywhere.

    python training.py FOLDER --loader infinite --workers 2 --context spawn --at write:3+0.5 --send KILL

Writes to FOLDER: `run/` (the work dir), `events.jsonl` (what happened, a line each, unbuffered) and, at the end of the
training, `result.json` (sha256 of weights, EMA, optimizer and the rest).
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset

from torch_frame import CheckpointerHook, EvalHook, HookBase, InfiniteDataLoader, LoggerHook, Trainer

SIZE, BATCH_SIZE, WINDOW, EPOCHS = 26, 4, 3, 3  # windows of 3, 3 and 1 batches
BATCHES = -(-SIZE // BATCH_SIZE)  # 7: six of 4 samples, one of 2
TASKS = ("one", "two-optimizers", "hook-subclass", "loss-with-weights", "save-frozen")
EVAL_BATCHES = 3


class Events:
    """A file that processes append lines to, each in one piece and at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, **values: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), **values}) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())
        os.close(handle)


class Fault:
    """Sends the training process a signal when a point has been reached so many times.

    Args:
        at: POINT:TIMES[+MILLISECONDS]: the signal comes so long after the point. "" for never.
        number: of the signal.
        to_group: the whole process group gets it, loader workers and all.
    """

    def __init__(self, at: str, number: int, to_group: bool, events: Events) -> None:
        self.point, _, when = at.partition(":")
        times, _, delay = when.partition("+")
        self.times = int(times or 1)
        self.delay_s = float(delay or 0) / 1000
        self.number = number
        self.to_group = to_group
        self.events = events
        self.training_pid = os.getpid()

    def reached(self, point: str) -> None:
        if point != self.point:
            return
        self.times -= 1
        if self.times != 0:
            return
        if self.delay_s:
            threading.Timer(self.delay_s, self._send).start()
        else:
            self._send()

    def _send(self) -> None:
        self.events.add("signal", number=self.number)
        if self.to_group:  # by a third process: torch's workers take a SIGTERM of their parent's for their orderly end
            subprocess.run(["sh", "-c", f"kill -{self.number:d} -{os.getpgid(self.training_pid)}"], check=False)
        else:
            os.kill(self.training_pid, self.number)


WATCHED = ("open", "os.rename", "os.link", "os.remove", "os.truncate")


def watch_files(fault: Fault, checkpoints: Path, *curves: str) -> None:
    """Points inside a save, by what python tells an audit hook before it opens, renames, links or removes a file."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event not in WATCHED or os.getpid() != fault.training_pid:
            return
        paths = [os.fspath(arg) for arg in args[:2] if isinstance(arg, str | os.PathLike)]
        if event != "open" and any(path.startswith(curves) for path in paths):
            fault.reached("curves")  # a resumed run shortens metrics.jsonl and TensorBoard's files, or removes one
        if not paths or not paths[0].startswith(str(checkpoints)):
            return
        if event == "open" and paths[0] == str(checkpoints):
            fault.reached("renamed")  # the folder is synced when the file has its name
        elif event == "open" and paths[0].endswith(".tmp"):
            fault.reached("write" if args[1] is not None and "w" in args[1] else "verify")
        elif event != "open":
            fault.reached(event.removeprefix("os."))

    sys.addaudithook(audit)


class Images(Dataset[Any]):
    """Small images of four classes, augmented by all three generators.

    Args:
        block: loading this sample takes until there is a file `released`.
    """

    def __init__(self, fault: Fault, block: int | None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.arange(SIZE) % 4
        self.images = torch.randn(SIZE, 3, 8, 8, generator=generator) + self.labels.view(-1, 1, 1, 1) / 2
        self.fault = fault
        self.block = block

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        self.fault.reached("sample")
        if index == self.block:
            self.fault.events.add("blocked", index=index)
            while not self.fault.events.path.with_name("released").exists():
                time.sleep(0.05)
        image = self.images[index]
        if random.random() < 0.5:
            image = image.flip(-1)
        image = image * float(np.random.uniform(0.8, 1.2)) + 0.1 * torch.randn(image.shape)
        return image, self.labels[index], index


class Net(nn.Module):
    """A CNN with batch norm and dropout: images (N, 3, 8, 8) -> (N, 4)."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(72, 4))
        self.__dict__["fault"] = fault

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        if self.training:
            self.fault.reached("forward")
            features.register_hook(lambda gradient: self.fault.reached("backward"))
        scores: Tensor = self.head(features)
        return scores

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        copy = Net(self.fault)
        copy.load_state_dict(self.state_dict())
        return copy


class Stages(HookBase):
    """Tells the fault of every stage, and the events where training begins."""

    def __init__(self, fault: Fault, events: Events) -> None:
        self.fault = fault
        self.events = events

    def before_train(self) -> None:
        trainer = self.trainer
        self.events.add("begin", resumed_iter=trainer.resumed_iter, iter=trainer.progress.iter, time=time.time())
        self.fault.reached("before_train")

    def before_epoch(self) -> None:
        self.fault.reached("before_epoch")

    def before_iter(self) -> None:
        self.fault.reached("before_iter")

    def before_update(self) -> None:
        self.fault.reached("before_update")

    def after_update(self) -> None:
        self.fault.reached("after_update")

    def after_iter(self) -> None:
        self.fault.reached("after_iter")

    def after_epoch(self) -> None:
        self.fault.reached("evaluated")  # EvalHook has run, LoggerHook has not, nothing of it is saved

    def after_train(self) -> None:
        self.fault.reached("after_train")


class Logger(LoggerHook):
    """A LoggerHook with a point behind its rows of an epoch, which nothing saved knows of yet."""

    fault: Fault

    def after_epoch(self) -> None:
        super().after_epoch()
        self.fault.reached("logged")


class Level(enum.Enum):
    LOW, HIGH = 1, 2


class Softening(EvalHook):
    """An EvalHook with attributes, of which one is what the training goes by."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.smoothing = 0.1
        self.errors: list[float] = []
        self.worst = np.zeros(2)
        self.levels: set[Level] = set()
        self.level = Level.LOW

    def after_epoch(self) -> None:
        super().after_epoch()
        self.errors.append(self.metric_storage["eval_error"].latest)
        self.worst = np.maximum(self.worst, self.errors[-1])
        self.smoothing *= 0.5 + 0.1 * float(self.worst[0] > self.errors[-1])
        self.level = Level.HIGH
        self.levels.add(self.level)


class TwoOptimizers(Trainer):
    """The head's optimizer, its schedule and a momentum teacher are attributes. Each batch is an update."""

    def __init__(self, model: Net, *args: Any, **settings: Any) -> None:
        super().__init__(model, *args, **settings)
        self.optimizer_of_head = AdamW(model.head.parameters(), lr=0.02)
        self.schedules = [ExponentialLR(self.optimizer_of_head, 0.97)]
        self.teacher = nn.Linear(72, 4)
        self.ends_window = False

    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        assert self.step_fn is not None
        assert self.model_ema is not None
        head: Any = self.model.head[-1]  # type: ignore[index]
        loss = self.step_fn(self.model, batch)["loss"] + 0.01 * (head.weight - self.teacher.weight).square().sum()
        self.ends_window = (
            self.inner_iter + 1
        ) % WINDOW == 0 or self.inner_iter + 1 == BATCHES  # as often as the others
        for optimizer in (self.optimizer, self.optimizer_of_head):
            optimizer.zero_grad()
        loss.backward()
        if self.ends_window:
            self.call("before_update")
        for optimizer in (self.optimizer, self.optimizer_of_head):
            optimizer.step()
        self.lr_scheduler.step()
        self.lr_scheduler.step_scheduler()
        self.schedules[0].step()
        self.model_ema.update(self.model)
        for old, new in zip(self.teacher.parameters(), head.parameters(), strict=True):
            old.data = old.data * 0.9 + new.data * 0.1
        if self.ends_window:
            self.call("after_update")
        return {"total_loss": loss.detach()}


def make_loader(options: argparse.Namespace, dataset: Images) -> DataLoader[Any]:
    settings: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": options.workers}
    if options.workers:
        settings["multiprocessing_context"] = options.context
    if options.loader == "infinite":
        return InfiniteDataLoader(dataset, **settings)
    return DataLoader(dataset, persistent_workers=options.loader == "persistent", **settings)


def make_trainer(options: argparse.Namespace, fault: Fault, events: Events) -> Trainer:
    task = options.task
    model, criterion = Net(fault), nn.Linear(4, 4)
    groups: list[Any] = [{"params": list(model.parameters())}]
    if task == "two-optimizers":
        groups = [{"params": list(model.features.parameters())}]
    elif task == "loss-with-weights":
        groups.append({"params": list(criterion.parameters()), "weight_decay": 0.0})
    elif task == "save-frozen":  # a base that is the same in each process, as one from a file is
        with torch.no_grad():
            for parameter in model.features[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) / 5)
                parameter.requires_grad_(False)
        groups = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    optimizer = AdamW(groups, lr=0.01, weight_decay=0.05)
    window = 1 if task == "two-optimizers" else WINDOW
    schedule = OneCycleLR(optimizer, 0.02, total_steps=EPOCHS * -(-BATCHES // window))

    def stepped(*args: Any) -> None:  # before schedule and EMA
        if task != "two-optimizers" or trainer.ends_window:  # type: ignore[attr-defined]
            fault.reached("stepped")

    optimizer.register_step_post_hook(stepped)

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels, indices = batch
        events.add("iter", iter=trainer.cur_iter, epoch=trainer.epoch, indices=indices.tolist())
        images = images + random.random() * 0.1 + float(np.random.randn()) * 0.01  # the training's own random numbers
        scores = model(images)
        if task == "loss-with-weights":
            scores = scores + criterion(scores)
        smoothing = evaluation.smoothing if isinstance(evaluation, Softening) else 0.1
        return {"loss": F.cross_entropy(scores, labels, label_smoothing=smoothing)}

    def evaluate(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels = batch
        events.add("evaluate", epoch=trainer.epoch)
        fault.reached("evaluate")
        time.sleep(options.slow_eval)
        scores = model(images)
        return {"error": F.cross_entropy(scores, labels, reduction="none"), "acc": (scores.argmax(1) == labels).float()}

    generator = torch.Generator().manual_seed(2)
    held_out: Any = [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4) for _ in range(EVAL_BATCHES)]
    if options.eval_workers:  # which know nothing of signals
        held_out = DataLoader(held_out, None, num_workers=options.eval_workers, multiprocessing_context=options.context)
    logger = Logger(period=2)
    logger.fault = fault
    evaluation = (Softening if task == "hook-subclass" else EvalHook)(
        held_out, evaluate, save_metric="error", max_first=False, max_to_keep=2
    )
    trainer = (TwoOptimizers if task == "two-optimizers" else Trainer)(
        model,
        optimizer,
        schedule,
        make_loader(options, Images(fault, options.block)),
        EPOCHS,
        options.folder / "run",
        clip_grad_norm=1.0,
        warmup_method="linear",
        warmup_iters=4,
        hooks=[
            evaluation,
            CheckpointerHook(every_n_iters=2),
            Stages(fault, events),
            logger,
        ],
        use_ema=True,
        ema_decay=0.9,
        step_fn=step,
        precision="bf16",
        gradient_accumulation_steps=window,
        lr_scheduler_interval="iter",
        resume="auto",
        take_over=options.loader != "own",
        **({"save_frozen": False} if task == "save-frozen" else {}),
    )
    trainer.criterion = criterion if task == "loss-with-weights" else None  # type: ignore[attr-defined]
    return trainer


def feed(digest: Any, value: Any) -> None:
    """Put nested tensors and plain values into a digest, types and order included."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key!r}:".encode())
            feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            feed(digest, item)
    else:
        digest.update(repr(value).encode())


def sha256(value: Any) -> str:
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.hexdigest()


def outcome(trainer: Trainer) -> dict[str, str]:
    """What the run ends with, by part."""
    assert trainer.model_ema is not None
    parts = {
        "weights": trainer.model.state_dict(),
        "ema": trainer.model_ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "progress": trainer.progress.state_dict(),
        "random numbers": [torch.get_rng_state(), random.getstate(), np.random.random(4).tolist()],
        "best": [hook.cur_best for hook in trainer.hooks if isinstance(hook, EvalHook)],
    }
    if isinstance(trainer, TwoOptimizers):
        parts["head"] = [trainer.optimizer_of_head.state_dict(), trainer.schedules[0].state_dict()]
        parts["teacher"] = trainer.teacher.state_dict()
    if trainer.criterion is not None:  # type: ignore[attr-defined]
        parts["criterion"] = trainer.criterion.state_dict()  # type: ignore[attr-defined]
    for hook in trainer.hooks:
        if isinstance(hook, Softening):
            parts["attributes"] = [
                hook.smoothing,
                hook.errors,
                hook.worst.tolist(),
                hook.level,
                sorted(hook.levels, key=str),
            ]
    return {name: sha256(part) for name, part in parts.items()}


def note_the_first_signal(trainer: Trainer, events: Events) -> None:
    """An event when it has been handled: two that the system holds at once are one."""
    while trainer.stop_signals.received is None:
        time.sleep(0.01)
    events.add("asked to end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loader", choices=["plain", "persistent", "infinite", "own"], default="plain")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--task", choices=TASKS, default="one")
    parser.add_argument("--context", choices=["fork", "spawn", "forkserver"], default="fork")
    parser.add_argument("--eval-workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of weights and random numbers where nothing is resumed")
    parser.add_argument("--at", default="", help="POINT:TIMES[+MILLISECONDS]")
    parser.add_argument("--send", default="KILL", help="KILL, TERM, INT, USR1")
    parser.add_argument("--to-group", action="store_true")
    parser.add_argument("--block", type=int, help="loading this sample takes until there is a file FOLDER/released")
    parser.add_argument("--slow-eval", type=float, default=0.0, help="seconds a batch")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    random.seed(options.seed)
    events = Events(options.folder / "events.jsonl")
    fault = Fault(options.at, getattr(signal, f"SIG{options.send}"), options.to_group, events)
    run = options.folder / "run"
    watch_files(fault, run / "checkpoints", str(run / "metrics.jsonl"), str(run / "tb_logs"))
    trainer = make_trainer(options, fault, events)
    if options.block is not None:
        threading.Thread(target=note_the_first_signal, args=(trainer, events), daemon=True).start()
    trainer.train()
    parts = outcome(trainer)
    (options.folder / "result.json").write_text(json.dumps({"sha256": sha256(parts), "parts": parts}))


if __name__ == "__main__":
    main()
