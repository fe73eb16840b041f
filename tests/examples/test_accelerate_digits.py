"""The example of AccelerateTrainer: as a plain script, under `accelerate launch` on two processes, and resumed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.test_document import FILES, epochs_of, files_of, load
from tests.small_runs import ROOT, environment

pytest.importorskip("accelerate")
SCRIPT = ROOT / "examples" / "accelerate_digits.py"
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def run(cwd: Path, *command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, text=True, timeout=120, capture_output=True, check=False,
        env=environment(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(work_dir: Path) -> list[float]:
    state = load(work_dir / "checkpoints" / "latest.pth")
    values: list[float] = state["metric_storage"]["eval_acc"]["window"]
    return values


@pytest.mark.parametrize("launcher", [(), LAUNCH], ids=["plain", "launched"])
def test_it_trains_and_goes_on_where_it_stopped(launcher: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path, *launcher, SCRIPT, "--work-dir", "whole")
    assert files_of(tmp_path / "whole") == FILES
    assert epochs_of(tmp_path / "whole") == list(range(8))
    assert accuracies(tmp_path / "whole")[-1] > 0.93
    output = run(tmp_path, *launcher, SCRIPT, "--work-dir", "whole", "--resume")
    assert "Nothing to train: max_epochs is 8, and 8 epochs are done." in output
