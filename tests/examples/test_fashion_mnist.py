"""The Fashion-MNIST example runs, saves, resumes and says what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "fashion_mnist.py"
DATA = Path("/usr/share/datasets/fashion-mnist")
needs_data = pytest.mark.skipif(
    not (DATA / "train-images-idx3-ubyte.gz").exists(),
    reason=f"Fashion-MNIST is not in {DATA}: apt-get install dataset-fashion-mnist",
)


def run_script(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", SCRIPT, "--threads", "1", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def without_time(stdout: str) -> list[str]:
    summary, files = stdout.splitlines()[-2:]
    return [summary.partition(" It took ")[0], files]


@needs_data
def test_a_short_run_prints_its_accuracy_and_resumes_to_the_same(tmp_path: Path) -> None:
    options = ("--limit", "640", "--epochs", "1", "--work-dir", tmp_path / "run")
    first = run_script(*options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    summary, files = first.stdout.splitlines()[-2:]
    assert summary.startswith("Test accuracy: ")
    assert files == f"Files: {tmp_path / 'run'}"

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracy = rows[-1]["eval_acc"]
    assert 0.05 < accuracy < 0.95
    assert f"{accuracy:.2%} at the end, {accuracy:.2%} at best" in summary
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"best.pth", "epoch_0.pth", "latest.pth"} <= saved

    again = run_script(*options, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert without_time(again.stdout) == without_time(first.stdout)


def test_missing_data_is_one_sentence_with_the_cure(tmp_path: Path) -> None:
    run = run_script("--data", tmp_path / "nowhere", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == (
        f"There is no {tmp_path}/nowhere/train-images-idx3-ubyte.gz: install Fashion-MNIST with "
        "`apt-get install dataset-fashion-mnist`, or name its folder with --data.\n"
    )
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []
