"""`torch-frame bench`: what this machine's accelerator, or its CPU, can do, as a row to paste."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from torch_frame.bench.device import device_to_measure
from torch_frame.bench.suite import LIMIT_S, Bench
from torch_frame.bench.table import lines


def bench(*, as_json: bool = False, limit_s: float = LIMIT_S) -> int:
    """Measure, and print what was found.

    Args:
        as_json: one JSON object instead of the tables.
        limit_s: seconds for everything, Python's start included; what has no time left is left out, compiling first.

    Returns:
        0.
    """
    measured = Bench(device_to_measure(), limit_s=limit_s, used_s=process_age_s())
    found = measured.run()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for line in lines(found):
            print(line)
    if measured.abandoned:  # Python's own end would wait for the call that does not come back
        sys.stdout.flush()
        os._exit(0)
    return 0


def process_age_s() -> float:
    """Seconds since this process was started; where the system has no /proc to tell, those for which it had a processor."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks = int(fields[19])  # proc(5): starttime
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
