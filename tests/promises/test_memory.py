"""A long run needs no more memory than a short one."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import make_batches, make_trainer, run_python
from torch_frame import CheckpointerHook, EvalHook, HookBase, LoggerHook


class Repeated:
    """`num` batches, made of one; without a length where `sized` is False."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.batch = make_batches(1, 2)[0]

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.num):
            yield self.batch


class SizedRepeated(Repeated):
    def __len__(self) -> int:
        return self.num


class Census(HookBase):
    """Counts what is alive before each epoch: objects that gc knows, and blocks of Python's allocator."""

    def __init__(self) -> None:
        self.objects: list[int] = []
        self.blocks: list[int] = []

    def before_epoch(self) -> None:
        self.trainer.wait_for_saves()  # a save under way has objects of its own
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        self.blocks.append(sys.getallocatedblocks())


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"hooks": None},
    "no_hooks": {"hooks": []},
    "everything": {
        "hooks": [EvalHook([0], lambda model, batch: {"acc": [1.0]}, save_metric="acc", max_to_keep=2), LoggerHook()],
        "use_ema": True,
        "clip_grad_norm": 1.0,
        "gradient_accumulation_steps": 3,
        "warmup_method": "linear",
    },
    "no_length": {"hooks": [CheckpointerHook(), LoggerHook()], "data": Repeated(100), "on_nonfinite": "skip"},
    "fp16": {"hooks": [LoggerHook()], "precision": "fp16", "clip_grad_norm": 1.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_object_is_left_over_from_an_epoch(settings: dict[str, Any], tmp_path: Path) -> None:
    """800 steps in 8 epochs; from the third epoch on nothing is added."""
    trainer = make_trainer(tmp_path, **{"data": SizedRepeated(100), "max_epochs": 8, **settings})
    census = Census()
    trainer.register_hooks([census])
    trainer.train(4, 4)
    assert len(census.objects) == 8
    assert max(census.objects[3:]) - census.objects[3] <= 40, census.objects
    assert max(census.blocks[3:]) - census.blocks[3] <= 300, census.blocks


SCRIPT = """
import gc, json, os, sys
import torch
from tests.small_runs import make_trainer
from tests.promises.test_memory import SizedRepeated
from torch_frame import HookBase

torch.set_num_threads(1)

class Memory(HookBase):
    def __init__(self):
        self.rss, self.objects = [], []
    def after_iter(self):
        if self.every_n_iters(1000):
            self.trainer.wait_for_saves()
            gc.collect()
            with open("/proc/self/statm") as statm:
                self.rss.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            self.objects.append(len(gc.get_objects()))

memory = Memory()
trainer = make_trainer("run", data=SizedRepeated(2500), max_epochs=4, hooks=None)
trainer.register_hooks([memory])
trainer.train(4, 4)
print(json.dumps([memory.rss, memory.objects]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat_over_10_000_steps_with_the_default_hooks(tmp_path: Path) -> None:
    """In a process of its own, of which nobody else takes memory; measured each 1,000 steps, after the first save."""
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    rss, objects = json.loads(done.stdout.splitlines()[-1])
    assert len(rss) == 10
    assert max(rss[3:]) - rss[3] < 4 * 2**20, rss
    assert max(objects[3:]) - min(objects[3:]) <= 120, objects
