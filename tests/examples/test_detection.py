"""The detection example: its data, its loss on empty batches, and that a killed run ends with the same numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.processes import on_processes
from tests.small_runs import ROOT, environment

pytest.importorskip("sklearn")
pytest.importorskip("hotcoco")
pytest.importorskip("matplotlib")

SCRIPT = ROOT / "examples" / "detection.py"
SHORT = ("--epochs", "4", "--canvases", "24", "--batch-size", "8")


def example() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("detection_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(work_dir: Path, *options: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", *launch, str(SCRIPT), "--work-dir", str(work_dir), *options]
    return subprocess.Popen(
        command, env=environment(OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], timeout_s: float) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output


def scores_of(work_dir: Path) -> list[dict[str, float]]:
    """The scores of each epoch."""
    if not (work_dir / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in row.items() if name.startswith("eval_")} for row in rows if "eval_map" in row
    ]


def kill_after(num_epochs: int, work_dir: Path, *options: str) -> None:
    """Kill the run when so many epochs have been evaluated."""
    process = start(work_dir, *options)
    while len(scores_of(work_dir)) < num_epochs:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def check_same_end(whole: Path, killed: Path, output: str, resumed: str) -> None:
    assert scores_of(killed) == scores_of(whole)
    summary = r"mAP [\d.-]+, AP50 [\d.-]+ at the end; mAP [\d.-]+ at best"
    assert re.findall(summary, output) == re.findall(summary, resumed) != []
    for name in ("latest.pth", "best.pth"):
        one, other = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (whole, killed))
        one, other = (state.get("model", state) for state in (one, other))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (killed / "detections.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_short_run_killed_half_way_and_resumed_ends_with_the_same_numbers(tmp_path: Path) -> None:
    output = finish(start(tmp_path / "whole", *SHORT), 240)
    kill_after(2, tmp_path / "killed", *SHORT)
    resumed = finish(start(tmp_path / "killed", *SHORT, "--resume"), 240)
    assert len(scores_of(tmp_path / "whole")) == 4
    assert (tmp_path / "killed" / "log.txt").read_text(encoding="utf-8").count("Training begins at epoch") == 2
    check_same_end(tmp_path / "whole", tmp_path / "killed", output, resumed)


def test_canvases_are_the_same_each_time_and_no_held_out_digit_is_trained_on() -> None:
    module = example()
    (images, labels), (held_out, _) = module.load_digits()
    assert len(images) + len(held_out) == 1797
    trained = {image.tobytes() for image in images}
    assert not [image for image in held_out if image.tobytes() in trained]
    canvases = module.make_canvases(60, 0, (images, labels))
    for (image, rows), (again, rows_again) in zip(canvases, module.make_canvases(60, 0, (images, labels)), strict=True):
        assert np.array_equal(image, again)
        assert np.array_equal(rows, rows_again)
    numbers = [len(rows) for _, rows in canvases]
    assert 0 in numbers
    assert max(numbers) >= 9
    boxes = np.concatenate([rows[:, 1:] for _, rows in canvases])
    assert (boxes >= 0).all()
    assert (boxes <= module.SIZE).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_mosaics_stop_in_the_last_epochs() -> None:
    module = example()
    canvases = module.make_canvases(4, 0, module.load_digits()[0])
    data = module.Augmented(canvases, plain_from=3)
    for epoch, is_plain in ((0, False), (2, False), (3, True), (4, True)):
        data.set_epoch(epoch)
        kept = []
        for index, (_, rows) in enumerate(canvases):
            image, filled = data[index]
            assert image.shape == (1, module.SIZE, module.SIZE)
            assert filled.shape == (module.MAX_BOXES, 5)
            kept.append(np.array_equal(filled[filled[:, 0] >= 0].numpy(), rows))
        assert all(kept) is is_plain


def gradients(images: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor | None]:
    module = example()
    model = module.Detector(width=16)
    losses, _ = module.train_step(model, [images, targets])
    sum(losses.values()).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_a_batch_without_boxes_has_finite_losses_and_a_gradient_for_all_parameters() -> None:
    module = example()
    images = torch.zeros(4, 1, module.SIZE, module.SIZE, dtype=torch.uint8)
    found = gradients(images, torch.full((4, module.MAX_BOXES, 5), -1.0))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found)


def test_each_box_has_a_place_and_of_several_a_place_takes_the_smallest() -> None:
    module = example()
    targets = torch.full((1, module.MAX_BOXES, 5), -1.0)
    targets[0, 0] = torch.tensor([3, 10.0, 10, 50, 50])
    targets[0, 1] = torch.tensor([4, 25.0, 25, 37, 37])
    targets[0, 2] = torch.tensor([5, 71.0, 71, 72, 72])  # smaller than the distance of two places
    centres = module.places(12, 12, targets.device)
    owners = module.assigned(targets, centres)[0]
    assert set(owners.tolist()) == {-1, 0, 1, 2}
    for place, owner in zip(centres, owners.tolist(), strict=True):
        inside = (place > targets[0, :, 1:3]).all(dim=1) & (place < targets[0, :, 3:]).all(dim=1)
        if inside[1]:
            assert owner == 1
        elif owner in (0, 1):
            assert inside[owner]
    assert module.assigned(targets[:, 3:], centres).unique().tolist() == [-1]


def train_with_an_empty_rank(folder: Path) -> list[float]:
    module = example()
    rank = torch.distributed.get_rank()
    images = torch.zeros(2, 1, module.SIZE, module.SIZE, dtype=torch.uint8)
    targets = torch.full((2, module.MAX_BOXES, 5), -1.0)
    if rank == 0:
        targets[0, 0] = torch.tensor([3, 10.0, 10, 50, 50])
    from torch_frame import Trainer
    from torch_frame.distributed.ddp import DDP

    torch.manual_seed(0)
    model = module.Detector(width=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [[images, targets]] * 3
    strategy = DDP(own_shards=True)
    Trainer(model, optimizer, None, data, 1, folder, hooks=[], step_fn=module.train_step, strategy=strategy).train(5, 5)
    return [float(parameter.double().sum()) for parameter in model.parameters()]


def test_two_ranks_of_which_one_never_has_a_box_do_not_wait_for_each_other(tmp_path: Path) -> None:
    first, second = on_processes(train_with_an_empty_rank, tmp_path, 2, tmp_path / "run")
    assert first == second


def final_ap50(work_dir: Path) -> float:
    return scores_of(work_dir)[-1]["eval_map_50"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    work_dir = tmp_path_factory.mktemp("detection") / "whole"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = finish(start(work_dir), 1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 180, "CPU time: the 3 minutes are meant for an idle machine"
    return work_dir, output


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_the_full_run_reaches_its_goal_on_digits_that_it_has_not_seen(full_run: tuple[Path, str]) -> None:
    scores = scores_of(full_run[0])[-1]
    assert scores["eval_map_50"] >= 0.97
    assert scores["eval_map"] >= 0.75


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_the_full_run_killed_half_way_ends_with_the_same_numbers(full_run: tuple[Path, str], tmp_path: Path) -> None:
    whole, output = full_run
    kill_after(len(scores_of(whole)) // 2, tmp_path / "killed")
    resumed = finish(start(tmp_path / "killed", "--resume"), 1800)
    check_same_end(whole, tmp_path / "killed", output, resumed)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_two_ranks_end_within_a_hundredth_of_one(full_run: tuple[Path, str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the script trains on the CPU, which is tried without a GPU")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = finish(start(tmp_path / "ranks", launch=launch), 1800)
    assert output.count("at the end; mAP") == 1, "rank 0 alone prints"
    assert abs(final_ap50(tmp_path / "ranks") - final_ap50(full_run[0])) <= 0.01
