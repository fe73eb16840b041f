"""Run each Python snippet of docs/recipes.md as a script of its own, in an empty folder: `make recipes`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300


def snippets(text: str) -> list[tuple[str, str]]:
    """(heading, code) of each snippet, in order."""
    found, heading = [], ""
    for part in re.split(r"^(## [^\n]*|```python\n.*?^```)$", text, flags=re.MULTILINE | re.DOTALL):
        if part.startswith("## "):
            heading = part[3:]
        elif part.startswith("```python\n"):
            found.append((heading, part.removeprefix("```python\n").removesuffix("```")))
    return found


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run a snippet; it may not download anything."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.py").write_text(code, encoding="utf-8")
        command = [sys.executable, "recipe.py"]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )


def main() -> None:
    """Run those whose heading contains the argument; all without one."""
    wanted = sys.argv[1].lower() if len(sys.argv) > 1 else ""
    failed = 0
    for heading, code in snippets((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")):
        if wanted not in heading.lower():
            continue
        began = time.monotonic()
        result = run(code)
        failed += result.returncode != 0
        print(
            f"{'ok' if result.returncode == 0 else 'FAILED'}  {time.monotonic() - began:5.1f} s  {heading}", flush=True
        )
        if result.returncode != 0:
            print(result.stdout[-2000:] + result.stderr[-4000:])
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
