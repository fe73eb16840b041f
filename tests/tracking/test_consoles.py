"""Each line is on the screen once, whatever handlers there are."""

from __future__ import annotations

import io
import logging
import logging.config
import logging.handlers
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.small_hooks import On
from tests.small_runs import make_trainer, run_python
from torch_frame import LoggerHook, logger
from torch_frame.tracking.consoles import is_console


class Printing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


class ByAMethod(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        self.show(self.format(record))

    def show(self, line: str) -> None:
        sys.stderr.write(line)


class ByTqdm(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record))


class Sending(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sent.append(self.format(record))


class RichLike(logging.Handler):
    """As rich's: writes to its console's file."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.console = type("Console", (), {"file": file})()

    def emit(self, record: logging.LogRecord) -> None:
        self.console.file.write(record.getMessage())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: logging.StreamHandler(sys.stdout), True),
        (lambda: logging.StreamHandler(sys.stderr), True),
        (lambda: logging.StreamHandler(io.StringIO()), False),
        (lambda: logging.NullHandler(), False),
        (lambda: logging.handlers.MemoryHandler(10, target=logging.StreamHandler(sys.stdout)), True),
        (lambda: logging.handlers.MemoryHandler(10), False),
        (Printing, True),
        (ByAMethod, True),
        (ByTqdm, True),
        (Sending, False),
        (lambda: RichLike(sys.stdout), True),
        (lambda: RichLike(io.StringIO()), False),
    ],
)
def test_which_handlers_show_on_the_screen(make: Any, expected: bool) -> None:
    assert is_console(make()) is expected


@pytest.mark.parametrize("kind", ["printing", "rich", "loguru"])
def test_a_line_is_on_the_screen_once(kind: str, tmp_path: Path) -> None:
    if kind != "printing":
        pytest.importorskip(kind)
    setups = {
        "printing": "class H(logging.Handler):\n    def emit(self, record): print(self.format(record))\nhandler = H()",
        "rich": "from rich.console import Console\nfrom rich.logging import RichHandler\n"
        "handler = RichHandler(console=Console(width=200))",
        "loguru": "from loguru import logger\nclass H(logging.Handler):\n"
        "    def emit(self, record): logger.opt(depth=6).log(record.levelname, record.getMessage())\nhandler = H()",
    }
    code = (
        f"import logging\n{setups[kind]}\nlogging.basicConfig(level=logging.INFO, handlers=[handler])\n"
        "from pathlib import Path\nfrom tests.small_runs import make_trainer\nfrom torch_frame import LoggerHook\n"
        "make_trainer(Path('run'), hooks=[LoggerHook(progress_bar=False)]).train()\n"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("Training begins at epoch") == 1


class Tee:
    """Has `write` and nothing else."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def test_a_stdout_with_write_alone_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tee = Tee()
    monkeypatch.setattr(sys, "stdout", tee)
    make_trainer(tmp_path / "run", hooks=[LoggerHook()], max_epochs=1).train()
    assert "Epoch 1/1" in tee.text


def test_a_stdout_that_fails_oddly_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, text: str) -> None:
            raise TypeError("not this way")

    monkeypatch.setattr(sys, "stdout", Broken())
    trainer = make_trainer(tmp_path / "run", hooks=[LoggerHook()], max_epochs=1)
    trainer.train()
    assert "Epoch 1/1" in Path(trainer.log_file).read_text()


@pytest.fixture
def logging_as_before() -> Any:
    root = logging.getLogger()
    kept = root.handlers[:], root.level, logger.handlers[:], logger.level, logger.propagate
    yield
    root.handlers[:], root.level = kept[0], kept[1]
    logger.handlers[:], logger.level, logger.propagate, logger.disabled = kept[2], kept[3], kept[4], False


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("when", ["before", "during"])
def test_logging_config_does_not_silence_a_run(when: str, tmp_path: Path) -> None:
    def configure(*_: Any) -> None:
        logging.config.dictConfig({"version": 1})  # disable_existing_loggers is True by default

    if when == "before":
        configure()
    during = On(before_epoch=lambda trainer: configure() if trainer.epoch == 1 and when == "during" else None)
    trainer = make_trainer(tmp_path / "run", hooks=[during, LoggerHook(progress_bar=False)], max_epochs=3)
    trainer.train()
    lines = Path(trainer.log_file).read_text()
    assert "Epoch 2/3" in lines
    assert "Epoch 3/3" in lines
    assert ("had switched off the logger" in lines) == (when == "during")


@pytest.mark.parametrize(
    "error", ["TypeError('Descriptors cannot be created')", "AttributeError('no bool8')", "ImportError('notf')"]
)
def test_a_broken_tensorboard_is_left_out_with_a_line(error: str, tmp_path: Path) -> None:
    (tmp_path / "broken" / "tensorboard").mkdir(parents=True)
    (tmp_path / "broken" / "tensorboard" / "__init__.py").write_text(f"raise {error}\n")
    code = (
        "import sys; sys.path.insert(0, 'broken')\nfrom pathlib import Path\nfrom tests.small_runs import make_trainer\n"
        "make_trainer(Path('run'), hooks=None).train()\n"
    )
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("TensorBoardWriter is left out: tensorboard is installed, but cannot be imported") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text()
