"""Runs a script on a real pseudo-terminal."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"


def script_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what changes colours or bars, and with `variables`."""
    unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONIOENCODING", "PYTHONUTF8")
    kept = {key: value for key, value in os.environ.items() if key not in unwanted and not key.startswith("TQDM_")}
    return {**kept, "PYTHONPATH": str(SRC), "PYTHONWARNINGS": "error", "TERM": "xterm", **variables}


def run_script(script: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """Runs `script` with pipes for stdout and stderr."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=script_environment(**variables), capture_output=True, timeout=120)


def run_on_terminal(script: str, size: tuple[int, int] = (24, 80), **variables: str) -> str:
    """Runs `script` with stdout and stderr on a terminal of `size` (rows, columns); returns all that it was sent."""
    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    termios = pytest.importorskip("termios")
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, size)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=child, stderr=child, env=script_environment(**variables)
    )
    os.close(child)
    sent = b"".join(iter(lambda: _read(parent), b""))
    os.close(parent)
    assert process.wait(timeout=120) == 0, sent.decode()
    return sent.decode()


def _read(parent: int) -> bytes:
    try:
        return os.read(parent, 4096)
    except OSError:  # Linux: EIO once the other end is closed
        return b""
