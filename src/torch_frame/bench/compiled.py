"""The compiled network, in a process of its own: compiling takes as long as it takes, and can be given up there.

python -m torch_frame.bench.compiled cuda:0 64 2.0      # device, batch size, seconds to time: prints JSON
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torch_frame.bench.timing import Timing, clock_of, time_calls
from torch_frame.bench.work import is_out_of_memory, training_step


def time_compiled(device: torch.device, batch_size: int, seconds: float, *, limit_s: float) -> tuple[int, Timing]:
    """ResNet-50's training step in bf16, channels-last, compiled block by block.

    Args:
        batch_size: halved until it fits.
        seconds: to time.
        limit_s: after so many seconds the process is ended, and those that it has started to compile.

    Returns:
        The batch size, and the times.

    Raises:
        RuntimeError: if it takes longer, or fails; the message says which.
    """
    command = [sys.executable, "-m", "torch_frame.bench.compiled", str(device), str(batch_size), str(seconds)]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Files, not pipes: the compiler's own processes inherit a pipe, and its reader waits for the last of them.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        # Ctrl-C reaches neither this thread nor the process, which has a session of its own.
        atexit.register(_end, process)
        try:
            status = process.wait(max(limit_s, 0.1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"compiling took longer than the {limit_s:.0f} s that were left; torch keeps what it has compiled, so a second "
                "run needs less"
            ) from None
        finally:
            _end(process)
            atexit.unregister(_end)
        out.seek(0), err.seek(0)
        if status != 0:
            lines = err.read().strip().splitlines() or [f"exit status {status}"]
            raise RuntimeError(f"compiling failed: {lines[-1]}")
        found = json.loads(out.read().splitlines()[-1])
    return found["batch_size"], Timing(found["seconds"])


def _end(process: subprocess.Popen[str]) -> None:
    """The process, and on POSIX its children: they are in its session."""
    with contextlib.suppress(OSError):  # all are gone
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
    process.wait()


def main(device_name: str, batch_text: str, seconds: str) -> None:
    device, batch_size = torch.device(device_name), int(batch_text)
    while True:
        try:
            times = _times(device, batch_size, float(seconds))
            break
        except RuntimeError as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
        batch_size //= 2
        if device.type != "cpu":
            torch.accelerator.empty_cache()
    print(json.dumps({"batch_size": batch_size, "seconds": list(times.seconds)}), flush=True)
    os._exit(0)  # torch waits at its end for its compilers, up to 300 s: pytorch/pytorch#162199


def _times(device: torch.device, batch_size: int, seconds: float) -> Timing:
    size = (batch_size, 3, 224, 224)
    step = training_step("resnet50", size, device, bf16=True, channels_last=True, compiled=True)
    return time_calls(step, clock_of(device), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
