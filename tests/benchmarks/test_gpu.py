"""`make gpu` on a machine without a card: a sentence, and an exit status that it tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_runs import ROOT, environment

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
    assert "nonsense is no part; the parts are tests, steps, host_waits, bench, prefetch, save" in done.stderr


@without_accelerator
@pytest.mark.slow
def test_the_script_runs_through_with_tiny_networks(tmp_path: Path) -> None:
    parts = ["steps", "host_waits", "prefetch", "save"]
    results = tmp_path / "results.json"
    done = run("--try-on-cpu", "--rounds", "2", "--only", ",".join(parts), "--output", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert list(found["parts"]) == parts
    assert found["parts"]["steps"]["transformer"]["torch-frame, no hooks"]["ratio_median"] > 0
    assert found["parts"]["save"]["13 MB"]["asynchronous, buffers reused"]
