"""The examples for several processes: the document's multi-card script, and a plain script under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.test_document import FILES, epochs_of, files_of, load
from tests.examples.test_fashion_mnist import SCRIPT, needs_data
from tests.small_runs import ROOT, environment

SPAWN = ROOT / "examples" / "ddp_spawn.py"
DOCUMENT = """\
from torch_frame import DDPTrainer
import torch.multiprocessing as mp
import torch.distributed as dist
def main(cur_gpu, args):
    if args.use_dist:
        rank = args.nprocs * args.machine_rank + cur_gpu
        init_method=args.url, world_size=args.world_size, rank=rank)
        // args.world_size  # 这里需要把一个batch平分到每个gpu的数量
    else:
        args.train_batch_size = args.batch_size
    # 创建网络相关对象
    model = get_model(conf)
        torch.cuda.set_device(cur_gpu)
        model.cuda(cur_gpu)
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[cur_gpu],
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    optimizer = Adam(model.parameters(), lr)
    lr_scheduler = MultiStepLR(optimizer,
    if cur_gpu == 0:
    else:
        hooks = []
        use_dist=args.use_dist
    if args.use_dist:
        mp.spawn(main, nprocs=args.nprocs, args=(args,))
    else:
        main(0, args)"""


def run(cwd: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=cwd, env=environment(OMP_NUM_THREADS="1"), text=True, timeout=120, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_multi_card_script_has_the_documents_lines_in_their_order() -> None:
    script = SPAWN.read_text(encoding="utf-8")
    place = 0
    for line in DOCUMENT.splitlines():
        place = script.find(line.strip(), place)
        assert place >= 0, line


def test_the_multi_card_script_trains_on_two_processes(tmp_path: Path) -> None:
    output = run(tmp_path, SPAWN)
    assert [path.name for path in tmp_path.iterdir()] == ["work_dir"]
    assert files_of(tmp_path / "work_dir") == FILES
    assert epochs_of(tmp_path / "work_dir") == list(range(6))
    state = load(tmp_path / "work_dir" / "checkpoints" / "latest.pth")
    assert state["metric_storage"]["eval_acc"]["window"][-1] > 0.9
    assert not any(name.startswith("module.") for name in load(tmp_path / "work_dir" / "checkpoints" / "best.pth"))
    assert len(state["rng"]) == 2
    assert output.count("Epoch 6/6") == 1, "rank 0 alone prints"
    assert "32 samples an update (16 a batch x 2 processes)" in output


@pytest.mark.slow
def test_the_multi_card_script_trains_on_one_process(tmp_path: Path) -> None:
    run(tmp_path, SPAWN, "--single")
    state = load(tmp_path / "work_dir" / "checkpoints" / "latest.pth")
    assert state["metric_storage"]["eval_acc"]["window"][-1] > 0.9


@pytest.mark.slow
@needs_data
def test_a_script_for_one_process_runs_under_torchrun(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if torch.cuda.is_available():
        pytest.skip("the script trains on the CPU, which is tried without a GPU")
    options = ["--limit", "1280", "--epochs", "1", "--threads", "1", "--work-dir", tmp_path / "run"]
    output = run(tmp_path, *command, SCRIPT, *options)
    assert output.count("Test accuracy: ") == 1
    assert "1 epoch x 10 batches, 10 updates" in output, "10 batches of 128, shared by two"
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} >= {"best.pth", "latest.pth"}
