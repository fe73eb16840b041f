"""The compiled network, in a process of its own: compiling takes as long as it takes, and can be given up there.

python -m torch_frame.bench.compiled cuda:0 64 2.0      # device, batch size, seconds to time: prints JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from torch_frame.bench.timing import Timing, clock_of, time_calls
from torch_frame.bench.work import training_step


def time_compiled(device: torch.device, batch_size: int, seconds: float, *, limit_s: float) -> Timing:
    """ResNet-50's training step in bf16, channels-last, compiled.

    Args:
        seconds: to time.
        limit_s: after so many seconds the process is ended.

    Raises:
        RuntimeError: if it takes longer, or fails; the message says which.
    """
    command = [sys.executable, "-m", "torch_frame.bench.compiled", str(device), str(batch_size), str(seconds)]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(limit_s, 0.1), check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"compiling took longer than the {limit_s:.0f} s that were left") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"compiling failed: {lines[-1]}")
    return Timing(json.loads(done.stdout.splitlines()[-1]))


def main(device_name: str, batch_size: str, seconds: str) -> None:
    device = torch.device(device_name)
    input_size = (int(batch_size), 3, 224, 224)
    step = training_step("resnet50", input_size, device, bf16=True, channels_last=True, compiled=True)
    print(json.dumps(time_calls(step, clock_of(device), float(seconds)).seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
