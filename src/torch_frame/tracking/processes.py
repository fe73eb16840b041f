"""Whether the process that trained is still there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_CLOCKS_DIFFER_S = 5.0


def is_alive(pid: Any, since: Any) -> bool:
    """Whether a process of this machine is there, and is the one that was there at a time.

    Numbers are given again, in a container soon, and a killed process that its parent does not ask for stays as a zombie; Linux
    tells both. On Windows, which would end a process for the question, it is taken to be alive.

    Args:
        pid: its number.
        since: seconds since 1970 when it was there; anything else: not known.
    """
    if os.name == "nt" or not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    found = _state_and_begin(pid)
    if found is None:
        return True
    state, begun_s = found
    is_another = isinstance(since, int | float) and begun_s > since + _CLOCKS_DIFFER_S
    return state not in ("Z", "X") and not is_another


def _state_and_begin(pid: int) -> tuple[str, float] | None:
    """A letter of Linux's, and when the process began in seconds since 1970; None: not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        booted_s = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
        return fields[0], booted_s + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None
