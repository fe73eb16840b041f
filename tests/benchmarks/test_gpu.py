"""`make gpu` on a machine without a card: a sentence, and an exit status that it tells."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.small_runs import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
from _beside import in_turn, until_it_fits  # not a package

SCRIPT = str(ROOT / "benchmarks" / "gpu.py")
without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=250, check=False)


@without_accelerator
def test_without_a_card_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "results.json"))
    assert done.returncode == 3
    assert done.stdout.count("\n") == 1
    assert "sees no accelerator on this machine, so nothing was run (exit status 3)." in done.stdout
    assert not (tmp_path / "results.json").exists()


def test_an_unknown_part_is_an_error_that_lists_the_parts() -> None:
    done = run("--only", "steps,nonsense")
    assert done.returncode == 2
    assert "nonsense is no part; the parts are tests, resume, steps, host_waits, bench, prefetch, save" in done.stderr


@without_accelerator
@pytest.mark.slow
def test_the_script_runs_through_with_tiny_networks(tmp_path: Path) -> None:
    parts = ["resume", "steps", "host_waits", "prefetch", "save"]
    results = tmp_path / "results.json"
    done = run("--try-on-cpu", "--rounds", "2", "--only", ",".join(parts), "--output", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert list(found["parts"]) == parts
    assert found["parts"]["steps"]["transformer"]["torch-frame, no hooks"]["ratio_median"] > 0
    assert found["parts"]["steps"]["resnet50"]["batch_size"] == 2
    assert found["parts"]["resume"]["differing"] == {"fp32": [], "bf16": []}
    assert "Not run: host_waits: torch cannot say it of cpu." in done.stdout
    assert done.stdout.rstrip().endswith("All other parts are done.")
    assert found["parts"]["save"]["13 MB"]["asynchronous, buffers reused"]


def test_a_batch_that_does_not_fit_is_halved_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(batch_size: int) -> dict[str, int]:
        if batch_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return {"steps": 3}

    assert until_it_fits(measure, 32) == {"batch_size": 8, "wanted_batch_size": 32, "steps": 3}
    assert capsys.readouterr().out.splitlines() == [
        "  out of memory; again with a batch of 16",
        "  out of memory; again with a batch of 8",
    ]
    assert until_it_fits(measure, 4) == {"batch_size": 4, "steps": 3}


def test_what_does_not_fit_at_all_and_every_other_error_reach_the_caller() -> None:
    def never(batch_size: int) -> dict[str, int]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def wrong(batch_size: int) -> dict[str, int]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(torch.OutOfMemoryError):
        until_it_fits(never, 4)
    with pytest.raises(RuntimeError, match="mat1"):
        until_it_fits(wrong, 4)


def test_rounds_end_when_the_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    def epoch() -> float:
        time.sleep(0.05)
        return 0.05

    times = in_turn({"raw": epoch, "ours": epoch}, 50, 1, time.perf_counter() + 0.5)
    assert 2 <= len(times["raw"]) == len(times["ours"]) < 8
    assert "rounds in the time there was, instead of 50" in capsys.readouterr().out
    assert len(in_turn({"raw": epoch}, 7, 1, 0.0)["raw"]) == 2  # two in any case: quartiles need them
