"""The scripts of the user's document run as they stand there, one after another, and after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import ROOT, environment

pytest.importorskip("sklearn")

EXAMPLES = ROOT / "examples"
DOCUMENT = {
    "document_single.py": """\
        # 创建dataset和dataloader
        from torch_frame import Trainer
        # 创建网络相关对象
        model = get_model(conf)
        optimizer = Adam(model.parameters(), lr)
        # 创建hooker，承载验证集部分和评估保存模型的任务
        # 创建Trainer对象并开始训练
        trainer = Trainer(model, optimizer, lr_scheduler, train_dataloader, num_epochs, "保存路径", hooks=hooks)
        trainer.train()""",
    "document_resume.py": """\
        trainer = Trainer(model, optimizer, lr_scheduler, train_dataloader, num_epochs, "保存路径", hooks=hooks)
        trainer.load_checkpoint("latest.pth")
        trainer.train(1, 1)""",
    "document_weights.py": """\
        trainer = Trainer(model, optimizer, lr_scheduler, train_dataloader, num_epochs, "保存路径", hooks=hooks)
        weights = torch.load(
        trainer.load_checkpoint(checkpoint=weights)
        trainer.train(1, 1)""",
}
FILES = {f"checkpoints/{name}.pth" for name in ("latest", "previous", "best")}
FILES |= {"log.txt", "metrics.jsonl", "run.json", "table.jsonl"}


def start(name: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=cwd, env=environment(OMP_NUM_THREADS="1"), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(name: str, cwd: Path) -> str:
    process = start(name, cwd)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def kill_in_mid_run(name: str, cwd: Path, latest: Path) -> int:
    """Kill the script shortly after it has written a state; returns the epochs done."""
    before = latest.stat().st_mtime_ns if latest.exists() else None
    process = start(name, cwd)
    while not latest.exists() or latest.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return int(load(latest)["progress"]["epoch"])


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def files_of(folder: Path) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("tb_logs/")}


def epochs_of(folder: Path) -> list[int]:
    """The epochs in metrics.jsonl that have an evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["epoch"] for row in rows if "eval_acc" in row]


@pytest.mark.parametrize("name", DOCUMENT)
def test_a_script_has_the_documents_lines_in_their_order(name: str) -> None:
    script = (EXAMPLES / name).read_text(encoding="utf-8")
    place = 0
    for line in DOCUMENT[name].splitlines():
        place = script.find(line.strip(), place)
        assert place >= 0, line


def check_finished(work_dir: Path, epochs: int) -> None:
    assert files_of(work_dir) == FILES
    assert list((work_dir / "tb_logs").iterdir())
    assert load(work_dir / "checkpoints" / "latest.pth")["progress"]["epoch"] == epochs
    assert epochs_of(work_dir) == list(range(epochs))


def test_the_single_card_script_trains_to_its_end(tmp_path: Path) -> None:
    run("document_single.py", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["保存路径"]
    check_finished(tmp_path / "保存路径", 6)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_goes_on_in_its_folder_twice_and_its_weights_begin_a_new_one(tmp_path: Path) -> None:
    work_dir = tmp_path / "保存路径"
    latest = work_dir / "checkpoints" / "latest.pth"
    first = kill_in_mid_run("document_single.py", tmp_path, latest)
    second = kill_in_mid_run("document_resume.py", tmp_path, latest)
    assert 1 <= first < second < 8
    run("document_resume.py", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["保存路径"]
    check_finished(work_dir, 8)

    run("document_weights.py", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    other = next(path for path in tmp_path.iterdir() if path != work_dir)
    check_finished(other, 2)
    accuracy = load(other / "checkpoints" / "latest.pth")["metric_storage"]["eval_acc"]["window"][0]
    assert accuracy > 0.93  # it began with the best weights: a fresh model is not there after one epoch
