"""Trains in a real notebook, through nbconvert, and checks that its page stays readable.

    python docs/images/page.py PAGE.html

The page has to show one line an epoch, each once, one output that the bars share and that is empty at the end, and no more than
the first and the last block beside them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

EPOCHS = 20
CELLS = [f"from torch_frame.cli.demo import train\ntrainer = train('run', {EPOCHS})", "trainer.evaluate()"]
MOST_LINES = EPOCHS + 40


def main() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": folder}})
    outputs = notebook.cells[0].outputs
    text = re.sub(r"\x1b\[[0-9;]*m", "", "".join(map(text_of, outputs)))
    lines = [line for line in text.splitlines() if line.strip()]
    epochs = [line.split()[1] for line in lines if re.match(r"Epoch \d", line)]
    replaced = [text_of(output) for output in outputs if output.output_type == "display_data"]

    page, _ = HTMLExporter().from_notebook_node(notebook)
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{len(lines)} lines, {len(epochs)} of epochs; outputs that are replaced: {len(replaced)}; {path}")
    problems = []
    if epochs != [f"{number}/{EPOCHS}" for number in range(1, EPOCHS + 1)]:
        problems.append(f"the epochs' lines are {epochs}")
    if len(lines) > MOST_LINES:
        problems.append(f"there are {len(lines)} lines, more than {MOST_LINES}")
    if len(replaced) > 1 or any(replaced):
        problems.append(f"the bars have left {replaced}")
    if problems:
        raise SystemExit("The notebook's page: " + "; ".join(problems))


def text_of(output: nbformat.NotebookNode) -> str:
    """What an output shows as plain text."""
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


if __name__ == "__main__":
    main()
