"""Tests of the progress bar, on a real pseudo-terminal where it matters."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from tqdm import tqdm

from tests.tracking.pseudo_terminal import run_on_terminal, run_script, script_environment
from torch_frame import NonFiniteError
from torch_frame.tracking.bar import ProgressBar, TerminalBar, is_terminal

LINES = "torch_frame.tracking.bar"


class Screen(io.StringIO):
    """A stream in memory that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_is_drawn_in_place_with_its_values_on_a_terminal() -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=5, desc="epoch 1/1", values=lambda: {"total_loss": 0.12345}) as bar:
            for _ in range(5):
                bar.update()
        """
    )
    last = sent.split("\r")[-2]
    assert "epoch 1/1: 100%" in last
    assert "5/5" in last
    assert "total_loss=0.1235" in last
    assert sent.endswith("\r\n")


def test_a_fast_loop_draws_at_most_ten_times_a_second_and_reads_values_only_then() -> None:
    reads = []
    stream = Screen()
    start_s = time.perf_counter()
    bar = ProgressBar(total=10**9, file=stream, values=lambda: {"reads": reads.append(1) or len(reads)})
    while time.perf_counter() - start_s < 0.55:
        bar.update()
    in_time = (time.perf_counter() - start_s) / 0.1
    assert 1 <= len(reads) <= in_time
    assert stream.getvalue().count("\r") <= in_time + 1
    bar.close()


def test_a_terminal_that_reports_no_size_still_shows_the_bar() -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=2) as bar:
            bar.update(2)
        """,
        size=(0, 0),
    )
    assert "2/2" in sent


def test_the_count_is_right_at_the_end_whatever_was_drawn() -> None:
    stream = Screen()
    with ProgressBar(total=7, file=stream, interval_s=3600) as bar:
        for _ in range(7):
            bar.update()
    assert "7/7" in stream.getvalue().split("\r")[-1]


def test_a_resumed_bar_starts_where_the_run_had_come_to() -> None:
    stream = Screen()
    with ProgressBar(total=10, initial=4, file=stream) as bar:
        assert "4/10" in stream.getvalue()
        bar.update(2)
    assert bar.n == 6


def test_elsewhere_it_writes_lines_without_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    values = {"total_loss": 0.12344}
    bar = ProgressBar(total=500, desc="epoch 3/10", file=stream, values=lambda: values, plain_interval_s=0.05)
    bar.update(100)
    time.sleep(0.06)
    bar.update(20)
    bar.close()
    assert stream.getvalue() == ""
    (line,) = [record.getMessage() for record in caplog.records if record.name == LINES]
    assert re.fullmatch(r"epoch 3/10  120/500  \d+\.\d it/s  ETA 0:00:0\d  total_loss 0.1234", line), line


def test_lines_come_once_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    start_s = time.perf_counter()
    bar = ProgressBar(file=io.StringIO(), plain_interval_s=0.1, unit="img")
    while time.perf_counter() - start_s < 0.35:
        bar.update()
    assert 1 <= len(caplog.records) <= (time.perf_counter() - start_s) / 0.1
    assert re.fullmatch(r"\d+  \d+\.\d img/s", caplog.records[0].getMessage())


def test_slow_steps_are_shown_in_seconds_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = ProgressBar(total=4, file=io.StringIO(), plain_interval_s=0)
    bar._display._last_s -= 5  # type: ignore[union-attr]
    bar.update(2)
    assert caplog.messages == ["2/4  2.5 s/it  ETA 0:00:05"]


def test_a_short_loop_writes_no_line_and_reads_no_values(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reads: list[int] = []
    with ProgressBar(total=3, file=io.StringIO(), values=lambda: {"x": len(reads.append(1) or reads)}) as bar:
        bar.update(3)
    assert not caplog.records
    assert not reads


def test_piped_stderr_gets_nothing_from_the_bar() -> None:
    done = run_script(
        """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=5, plain_interval_s=0) as bar:
            for _ in range(5):
                bar.update()
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_postfix_and_description_are_shown_at_the_next_draw_or_at_once() -> None:
    stream = Screen()
    bar = ProgressBar(total=3, file=stream, interval_s=3600, ncols=200)
    bar.set_postfix({"lr": 0.1}, acc=0.98765, step=123456, name="a")
    bar.set_description("epoch 1")
    assert "lr=" not in stream.getvalue()
    bar.set_postfix({"lr": 0.1}, acc=0.98765, step=123456, name="a", refresh=True)
    assert "epoch 1:   0%" in stream.getvalue()
    assert "lr=0.1, acc=0.9877, step=123456, name=a]" in stream.getvalue()
    bar.set_description_str("plain", refresh=True)
    bar.set_postfix_str("my note", refresh=True)
    assert "plain:   0%" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("my note]")
    bar.close()


def test_values_and_postfix_stand_side_by_side() -> None:
    bar = ProgressBar(disable=True, values=lambda: {"loss": 0.5, "lr": 0.2})
    bar.set_postfix(lr=0.1, acc=1.0)
    assert bar.shown() == {"lr": "0.2", "acc": "1", "loss": "0.5"}


@pytest.mark.parametrize("value", ["1", "True", "yes"])
def test_tqdm_disable_turns_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    stream = Screen()
    with ProgressBar(total=3, file=stream, interval_s=0) as bar:
        bar.update(3)
    assert stream.getvalue() == ""
    assert bar.n == 3


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_tqdm_disable_set_to_no_leaves_it_on(value: str) -> None:
    script = """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=3) as bar:
            bar.update(3)
        """
    assert "3/3" in run_on_terminal(script, TQDM_DISABLE=value)


def test_tqdms_interval_variable_is_kept_to() -> None:
    sent = run_on_terminal(
        """
        import time
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=30) as bar:
            for _ in range(30):
                time.sleep(0.01)
                bar.update()
        """,
        TQDM_MININTERVAL="60",
    )
    assert sent.count("/30") == 2  # at the start and at the end


def test_disabled_it_counts_and_shows_nothing() -> None:
    stream = Screen()
    with ProgressBar(total=3, disable=True, file=stream) as bar:
        bar.update()
        bar.set_postfix(loss=1.0, refresh=True)
    assert bar.n == 1
    assert stream.getvalue() == ""


def test_no_thread_is_left_and_tqdms_settings_are_untouched() -> None:
    before = tqdm.monitor_interval
    bar = ProgressBar(total=3, file=Screen())
    assert not any("TMonitor" in type(thread).__name__ for thread in threading.enumerate())
    assert tqdm.monitor_interval == before
    assert TerminalBar.monitor is None
    bar.close()
    assert bar._display is None


def test_a_bar_does_not_fix_the_start_method_of_processes() -> None:
    sent = run_on_terminal(
        """
        import multiprocessing
        from torch_frame.tracking.bar import ProgressBar
        ProgressBar(total=3).close()
        multiprocessing.set_start_method("spawn")
        print("free to choose")
        """
    )
    assert "free to choose" in sent


def test_a_child_forked_while_a_thread_draws_can_draw_and_log() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    sent = run_on_terminal(
        """
        import os, signal, threading, time, warnings
        from torch_frame.tracking.bar import ProgressBar, TerminalBar
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads, which is what we try
        bar = ProgressBar(total=3)
        held = threading.Event()
        def hold():
            with TerminalBar._lock:
                held.set()
                time.sleep(1)
        threading.Thread(target=hold).start()
        held.wait()
        if os.fork() == 0:
            signal.alarm(20)
            bar.set_postfix_str("from the child", refresh=True)
            os._exit(0)
        assert os.wait()[1] == 0
        bar.close()
        """
    )
    assert "from the child" in sent


def test_the_lock_is_free_after_drawing_failed() -> None:
    class Refusing(Screen):
        is_refusing = False

        def write(self, text: str) -> int:
            if self.is_refusing:
                raise RuntimeError("this terminal is odd")
            return super().write(text)

    stream = Refusing()
    bar = ProgressBar(total=3, file=stream, interval_s=0)
    stream.is_refusing = True
    bar.update()
    gained = []

    def try_lock() -> None:
        gained.append(TerminalBar._lock.acquire(timeout=5))
        TerminalBar._lock.release()

    thread = threading.Thread(target=try_lock)
    thread.start()
    thread.join()
    assert gained == [True]


class AsciiScreen(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")

    def isatty(self) -> bool:
        return True


def _fail_to_read() -> dict[str, float]:
    raise RuntimeError("no value")


def _closed_screen() -> Screen:
    stream = Screen()
    stream.close()
    return stream


def test_a_strict_stream_gets_what_its_encoding_has() -> None:
    stream = AsciiScreen()
    with ProgressBar(total=3, desc="训练", file=stream, interval_s=0) as bar:
        bar.update(3)
    assert b"\\u8bad\\u7ec3: 100%|###" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_bar_that_cannot_be_drawn_turns_itself_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "torch_frame")
    bar = ProgressBar(total=3, file=Screen(), values=_fail_to_read, interval_s=0)
    for _ in range(3):
        bar.update()
    bar.set_postfix(loss=1.0, refresh=True)
    bar.close()
    assert bar.n == 3
    (line,) = caplog.messages
    assert line.startswith("The progress bar is off: ")
    assert "no value" in line
    assert not list(TerminalBar._instances)


def test_a_stream_closed_in_the_middle_turns_it_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "torch_frame")
    stream = Screen()
    bar = ProgressBar(total=3, file=stream, interval_s=0)
    stream.close()
    bar.update(2)
    bar.close()
    assert bar.n == 2
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("stream", [Screen, io.StringIO])
def test_a_value_that_ends_the_run_is_not_swallowed(stream: type[io.StringIO]) -> None:
    def read() -> dict[str, float]:
        raise NonFiniteError("total_loss is not finite")

    bar = ProgressBar(total=3, values=read, interval_s=0, plain_interval_s=0, file=stream())
    with pytest.raises(NonFiniteError):
        bar.update()
    bar.close()


def test_values_that_fail_at_the_end_leave_a_whole_line(caplog: pytest.LogCaptureFixture) -> None:
    stream = Screen()
    bar = ProgressBar(total=3, file=stream, values=_fail_to_read, interval_s=3600)
    bar.update(3)
    bar.close()
    assert "3/3" in stream.getvalue()
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize("stream", [None, _closed_screen()], ids=["none", "closed"])
def test_a_missing_or_closed_stderr_is_no_terminal(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert not is_terminal(stream)
    with ProgressBar(total=3, plain_interval_s=0) as bar:
        bar.update(3)
    assert bar.n == 3


def test_stderr_closed_by_the_shell_is_no_problem() -> None:
    code = "from torch_frame.tracking.bar import ProgressBar\nwith ProgressBar(total=1) as b: b.update()\nprint('done')"
    if os.name == "nt":
        pytest.skip("needs sh")
    command = f'exec {sys.executable!r} -c "$CODE" 2>&-'
    done = subprocess.run(
        ["sh", "-c", command], env=script_environment(CODE=code), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_an_argument_that_nobody_knows_is_an_error_on_every_stream() -> None:
    with pytest.raises(TypeError, match="'leav'"):
        ProgressBar(total=3, file=io.StringIO(), leav=False)
    with pytest.raises(TypeError, match="mean the same"):
        ProgressBar(total=3, interval_s=1.0, mininterval=1.0)


def test_two_bars_at_once_have_their_own_lines() -> None:
    stream = Screen()
    with ProgressBar(total=2, desc="outer", file=stream) as outer:
        with ProgressBar(total=2, desc="inner", leave=False, file=stream) as inner:
            inner.update(2)
        outer.update(2)
    assert "\x1b[A" in stream.getvalue()
    assert "outer: 100%" in stream.getvalue()


def test_only_values_that_fit_whole_are_shown() -> None:
    script = """
        from torch_frame.tracking.bar import ProgressBar
        values = {"total_loss": 0.5, "cross_entropy": 0.25, "grad_norm": 123.0}
        with ProgressBar(total=5, desc="epoch 1/1", values=lambda: values) as bar:
            bar.update(5)
        """
    last = {width: run_on_terminal(script, size=(24, width)).split("\r")[-2] for width in (60, 80, 120)}
    assert [(width, len(line) <= width) for width, line in last.items()] == [(60, True), (80, True), (120, True)]
    assert "total_loss" not in last[60]
    assert last[80].endswith("total_loss=0.5]")
    assert last[120].endswith("total_loss=0.5, cross_entropy=0.25, grad_norm=123]")


@pytest.mark.parametrize("term", ["dumb", "unknown", "DUMB"])
def test_a_terminal_that_knows_no_escape_codes_gets_lines(term: str) -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        from torch_frame.tracking.console import setup_logger
        setup_logger("torch_frame")
        with ProgressBar(total=2, desc="outer", plain_interval_s=0) as outer:
            with ProgressBar(total=2, desc="inner", plain_interval_s=0, leave=False) as inner:
                inner.update(2)
            outer.update(2)
        """,
        TERM=term,
    )
    lines = sent.split("\r\n")
    assert [line.split()[:2] for line in lines if line] == [["inner", "2/2"], ["outer", "2/2"]]
    assert "\x1b" not in sent
    assert "\r" not in "".join(lines)


@pytest.mark.parametrize("columns", ["", "0", "x", "-3"])
def test_an_odd_columns_variable_breaks_no_bar(columns: str) -> None:
    done = run_script(
        """
        import io
        from torch_frame.tracking.bar import ProgressBar
        class Screen(io.StringIO):
            def isatty(self):
                return True
        stream = Screen()
        with ProgressBar(total=0, desc="none", values=lambda: {"a": float("nan")}, file=stream) as bar:
            bar.set_postfix_str("a note", refresh=True)
        assert "none" in stream.getvalue(), stream.getvalue()
        """,
        COLUMNS=columns,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_names_that_an_encoding_lacks_make_no_line_too_long() -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=9, desc="轮次", values=lambda: {"准确率": 0.5, "a\\nb": 1.0}, interval_s=0.0) as bar:
            for _ in range(9):
                bar.update()
        """,
        PYTHONIOENCODING="ascii",
    )
    assert "\\u8f6e\\u6b21" in sent
    assert max(map(len, re.split(r"[\r\n]+", sent))) <= 80


@pytest.mark.parametrize(("encoding", "drawn_with"), [("gbk", "#"), ("utf-8", "█")])
def test_blocks_that_take_two_cells_in_an_encoding_are_not_drawn(encoding: str, drawn_with: str) -> None:
    sent = run_on_terminal(
        """
        from torch_frame.tracking.bar import ProgressBar
        with ProgressBar(total=2, interval_s=0.0) as bar:
            bar.update(2)
        """,
        PYTHONIOENCODING=encoding,
    )
    assert drawn_with in sent
