"""Tests of the console and the log file of a run."""

import contextlib
import io
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.pseudo_terminal import run_on_terminal, run_script, script_environment
from torch_frame.tracking.console import (
    WIDTH_OF_A_PIPE,
    ConsoleHandler,
    console_width,
    logger,
    open_run_log,
    setup_logger,
    supports_color,
)
from torch_frame.tracking.line import Line

LINE = r"\[\d\d/\d\d \d\d:\d\d:\d\d a_project INFO\]: hello\n"


@pytest.fixture(autouse=True)
def _restored_loggers() -> Iterator[None]:
    names = ("torch_frame", "a_project")
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in names}
    yield
    for name, (level, propagate) in before.items():
        target = logging.getLogger(name)
        for handler in list(target.handlers):
            target.removeHandler(handler)
            handler.close()
        target.setLevel(level)
        target.propagate = propagate


@contextlib.contextmanager
def _root_without_pytest() -> Iterator[list[logging.Handler]]:
    """The root logger's handlers, without pytest's own."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    yield root.handlers
    root.handlers = before


def _state() -> tuple[int, bool, list[logging.Handler]]:
    return logger.level, logger.propagate, list(logger.handlers)


def test_importing_it_changes_nothing() -> None:
    done = run_script(
        """
        import logging
        from torch_frame.tracking.console import logger
        assert not logger.handlers and not logging.getLogger().handlers
        assert logger.level == 0 and logger.propagate
        """
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_line_of_a_users_logger_looks_as_in_1_7(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger("a_project").info("hello")
    assert re.fullmatch(LINE, capsys.readouterr().out)


def test_a_runs_lines_carry_no_date_on_the_console_and_one_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run_log(tmp_path / "log.txt", 2, 2):
        logger.info("hello")
        logging.getLogger("torch_frame.tracking.bar").info("30/60")
        logger.warning("take care")
        logger.error("it %s", "failed")
    assert capsys.readouterr().out == "hello\n30/60\nwarning: take care\nerror: it failed\n"
    for line in (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines():
        assert re.match(r"\[\d\d/\d\d \d\d:\d\d:\d\d torch_frame[\w.]* (INFO|WARNING|ERROR)\]: ", line)


def test_a_line_of_the_table_is_whole_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run_log(tmp_path / "log.txt", 2, 2):
        Line("a  b", "a  b  c", begins_block=True).log(logger)
    assert capsys.readouterr().out == "\na  b\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("INFO]: a  b  c\n")


@pytest.mark.parametrize(("columns", "width"), [("93", 93), ("", 120), ("0", 120), ("wide", 120)])
def test_without_a_terminal_columns_says_the_width(columns: str, width: int) -> None:
    script = "from torch_frame.tracking.console import console_width; print(console_width())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=script_environment(COLUMNS=columns),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.stdout == f"{width}\n".encode()


def test_the_width_is_that_of_the_terminal() -> None:
    script = "from torch_frame.tracking.console import console_width; print('width', console_width())"
    assert "width 91" in run_on_terminal(script, size=(30, 91))


class Odd:
    """A stream without anything that streams have."""


@pytest.mark.parametrize("stream", [None, Odd(), io.StringIO()])
def test_odd_streams_have_a_width(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in ("stdout", "stderr", "stdin"):
        monkeypatch.setattr(sys, name, stream)
    assert console_width() == WIDTH_OF_A_PIPE


def test_lines_for_a_pipe_that_nobody_reads_leave_no_trace() -> None:
    script = """
    from torch_frame.tracking.console import show_lines
    from torch_frame.tracking.line import Line
    show_lines(Line("a line of a table " * 10) for _ in range(100_000))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    pipe = subprocess.Popen(command, env=script_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    pipe.stdout.readline()
    pipe.stdout.close()
    assert (pipe.stderr.read(), pipe.wait(timeout=60)) == (b"", 0)
    pipe.stderr.close()


def test_setting_up_twice_gives_one_console(capsys: pytest.CaptureFixture[str]) -> None:
    first = setup_logger("a_project")
    assert setup_logger("a_project", console_log_level=logging.ERROR) is first
    first.info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert not first.propagate


def test_a_new_output_is_added_and_a_known_one_is_not(tmp_path: Path) -> None:
    setup_logger("a_project", output=str(tmp_path / "a.log"))
    setup_logger("a_project", output=tmp_path / "folder")
    project = setup_logger("a_project", output=str(tmp_path / "a.log"))
    project.info("你好 \udc80")
    for path in (tmp_path / "a.log", tmp_path / "folder" / "log.txt"):
        assert path.read_text(encoding="utf-8").count("你好 \\udc80\n") == 1


def test_a_file_may_want_more_than_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = setup_logger("a_project", tmp_path / "a.log", logging.WARNING, logging.DEBUG)
    project.debug("detail")
    assert "detail" in (tmp_path / "a.log").read_text()
    assert capsys.readouterr().out == ""


def test_it_writes_to_the_stdout_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    project = setup_logger("a_project")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    project.info("hello")
    assert "hello" in stream.getvalue()


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, _closed()], ids=["none", "closed"])
def test_no_stdout_is_no_problem(
    stream: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = setup_logger("a_project")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        project.info("hello")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_what_the_encoding_lacks_is_shown_as_an_escape(variables: dict[str, str]) -> None:
    done = run_script(
        """
        import sys
        from torch_frame.tracking.console import setup_logger
        sys.stdout.reconfigure(errors="strict")
        setup_logger("torch_frame").info("\\u8bad\\u7ec3 ok")
        """,
        **variables,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.rstrip().endswith(rb"\u8bad\u7ec3 ok")


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize("redirection", [">&-", "| true"])
def test_a_closed_or_broken_stdout_leaves_no_trace(redirection: str) -> None:
    code = (
        "import time\nfrom torch_frame.tracking.console import setup_logger\nlog = setup_logger('torch_frame')\n"
        "time.sleep(0.5)\nfor _ in range(3):\n    log.info('hello')\nimport sys\nprint('end', file=sys.stderr)\n"
    )
    # The script's own exit status, not the pipe's, is written to stderr.
    command = f'{{ {sys.executable} -c "$CODE"; echo status $? >&2; }} {redirection}'
    done = subprocess.run(["sh", "-c", command], env=script_environment(CODE=code), capture_output=True, timeout=120)
    assert done.stderr.decode().split("\n") == ["end", "status 0", ""]


def test_a_line_stands_above_the_bar_and_not_inside_it() -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        from torch_frame.tracking.console import setup_logger
        log = setup_logger("torch_frame")
        with ProgressBar(total=2, desc="epoch") as bar:
            bar.update(1)
            log.info("hello")
            bar.update(1)
        """
    )
    line = next(line for line in sent.split("\r\n") if "hello" in line)
    on_screen = line.split("\r")[-1]
    assert on_screen == "hello"
    assert re.fullmatch(r"\s*", line.split("\r")[-2])  # the bar was wiped before


def test_a_users_own_tqdm_bar_is_cleared_too() -> None:
    sent = run_on_terminal(
        """
        from tqdm import tqdm
        from torch_frame.tracking.console import setup_logger
        log = setup_logger("torch_frame")
        for _ in tqdm(range(2), desc="mine"):
            log.info("hello")
        """
    )
    lines = [line.split("\r")[-1] for line in sent.split("\r\n") if "hello" in line]
    assert [line[-5:] for line in lines] == ["hello", "hello"]
    assert not any("mine" in line for line in lines)


COLORED = """
    from torch_frame.tracking.console import setup_logger
    setup_logger("torch_frame", color=True).warning("hello")
"""


def test_colours_are_shown_on_a_terminal_that_was_asked_for_them() -> None:
    assert "\x1b[33mwarning:\x1b[0m hello" in run_on_terminal(COLORED)
    assert "\x1b[32m" in run_on_terminal(COLORED.replace('torch_frame"', 'a_project"'))


RUN_LINE = """
    from torch_frame.tracking.console import logger, open_run_log
    from torch_frame.tracking.line import Line
    with open_run_log(None, 2, 2):
        Line("acc 0.9*", marks=((4, 8, "best"),)).log(logger)
"""


@pytest.mark.parametrize(
    ("variables", "is_colored"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_a_run_is_coloured_on_terminals_that_want_it(variables: dict[str, str], is_colored: bool) -> None:
    assert ("\x1b" in run_on_terminal(RUN_LINE, **variables)) is is_colored


@pytest.mark.parametrize(
    ("variables", "is_colored"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "0"}, False)]
)
def test_a_pipe_is_coloured_if_that_is_forced(variables: dict[str, str], is_colored: bool) -> None:
    assert (b"\x1b" in run_script(RUN_LINE, **variables).stdout) is is_colored


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_refused(variables: dict[str, str]) -> None:
    assert "\x1b[" not in run_on_terminal(COLORED, **variables)
    assert "\x1b[" not in run_on_terminal(COLORED.replace("color=True", "color=False"))


def test_a_pipe_gets_no_colours() -> None:
    assert b"\x1b" not in run_script(COLORED).stdout


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "known"),
    [({}, False), ({"WT_SESSION": "x"}, True), ({"ConEmuANSI": "ON"}, True), ({"TERM_PROGRAM": "vscode"}, True)],
)
def test_windows_shows_colours_only_where_they_are_known_to_work(environ: dict[str, str], known: bool) -> None:
    assert supports_color(Screen(), environ, "nt") is known
    assert not supports_color(io.StringIO(), environ, "nt")


def test_each_run_of_a_process_has_its_own_file(tmp_path: Path) -> None:
    before = _state()
    for name in ("a", "b"):
        with open_run_log(str(tmp_path / name / "log.txt"), 2, 2) as run:
            logger.info("训练 %s", name)
        run.close()
    assert _state() == before
    logger.info("after")
    for name in ("a", "b"):
        text = (tmp_path / name / "log.txt").read_text(encoding="utf-8")
        assert text.count("\n") == 1
        assert text.endswith(f"训练 {name}\n")


def test_a_run_that_goes_on_appends_to_its_file(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run_log(tmp_path / "log.txt", 5, 2):
            logger.info("hello")
    assert re.fullmatch(LINE.replace("a_project", "torch_frame") * 2, (tmp_path / "log.txt").read_text())


@pytest.mark.parametrize(("console", "file"), [(0, 0), (1, 3), (3, 1), (2, 2), (5, 0)])
def test_console_and_file_have_their_own_levels(
    console: int, file: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _root_without_pytest(), open_run_log(tmp_path / "log.txt", console, file):
        assert not logger.propagate
        for level in (5, 10, 20, 30, 40, 50):
            logger.getChild("part").log(level, "level=%d", level)
    levels = (5, 10, 20, 30, 40, 50)
    shown = [int(level) for level in re.findall(r"level=(\d+)", capsys.readouterr().out)]
    kept = [int(level) for level in re.findall(r"level=(\d+)", (tmp_path / "log.txt").read_text())]
    assert shown == [level for level in levels if level >= console * 10]
    assert kept == [level for level in levels if level >= file * 10]


@pytest.mark.parametrize("level", [-1, 6, 20, 2.5, "2", None])
def test_a_level_that_is_none_of_0_to_5_gets_a_sentence(level: object, tmp_path: Path) -> None:
    before = _state()
    with pytest.raises(ValueError, match=r"console_log_level must be 0 \(all\).*Give 2"):
        open_run_log(tmp_path / "log.txt", level, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="file_log_level must be"):
        open_run_log(tmp_path / "log.txt", 2, level)  # type: ignore[arg-type]
    assert _state() == before
    assert not (tmp_path / "log.txt").exists()


def test_a_console_that_was_set_up_before_keeps_its_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger("torch_frame", console_log_level=logging.DEBUG)
    before = _state()
    with open_run_log(tmp_path / "log.txt", 3, 3):
        logger.debug("detail")
    assert _state() == before
    assert capsys.readouterr().out.count("detail") == 1
    assert "detail" not in (tmp_path / "log.txt").read_text()


def test_a_users_root_console_is_used_once_and_at_the_runs_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    with _root_without_pytest() as root_handlers:
        root_handlers.append(handler)
        with open_run_log(tmp_path / "log.txt", 2, 1):
            assert logger.propagate
            logger.info("hello")
            logger.debug("detail")
    assert not handler.filters
    assert capsys.readouterr() == ("", "hello\n")
    assert "detail" in (tmp_path / "log.txt").read_text()


def test_handlers_of_the_root_that_are_no_console_still_get_the_records(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run_log(None, 2, 2):
        logger.info("hello")
    assert caplog.messages == ["hello"]
    assert capsys.readouterr().out.count("hello") == 1


def test_runs_inside_each_other_share_a_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _state()
    outer = open_run_log(tmp_path / "outer.txt", 2, 2)
    inner = open_run_log(tmp_path / "inner.txt", 2, 2)
    logger.info("both")
    outer.close()
    logger.info("inner only")
    inner.close()
    assert _state() == before
    assert capsys.readouterr().out.count("\n") == 2
    assert (tmp_path / "outer.txt").read_text().count("\n") == 1
    assert (tmp_path / "inner.txt").read_text().count("\n") == 2


def test_setting_up_in_the_middle_of_a_run_stays_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run_log(None, 2, 2):
        setup_logger("torch_frame")
    logger.info("hello")
    assert capsys.readouterr().out.count("hello") == 1


def test_a_file_that_cannot_be_opened_leaves_the_logger_alone(tmp_path: Path) -> None:
    before = _state()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_run_log(tmp_path / "file" / "log.txt", 2, 2)
    assert _state() == before


def test_a_formatter_of_ones_own_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("<%(message)s>"))
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "hello", None, None))
    assert capsys.readouterr().out == "<hello>\n"
