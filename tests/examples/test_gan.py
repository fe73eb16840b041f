"""The GAN example trains, draws its samples and resumes to the same weights."""

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "gan.py"


def run_script(*args: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", SCRIPT, *args]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_trains_draws_and_resumes(tmp_path: Path) -> None:
    from matplotlib import image

    options = ("--epochs", "2", "--precision", "bf16", "--work-dir", tmp_path / "run")
    first = run_script(*options, cwd=tmp_path)
    assert "Of 1000 samples a classifier of the real digits sees 0: " in first
    picture = image.imread(tmp_path / "run" / "samples.png")
    assert picture.shape[:2] == (500, 500)
    assert 0.05 < picture[..., :3].mean() < 0.95
    weights = torch.load(tmp_path / "run" / "checkpoints" / "best.pth", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    again = run_script(*options, "--resume", cwd=tmp_path)
    assert again.splitlines()[-2:] == first.splitlines()[-2:]
