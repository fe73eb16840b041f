"""The bench as a whole, small; its row, with stored figures; gpu_cnn_speed; the command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import torch_frame
from tests.small_runs import environment
from torch_frame.bench import compiled
from torch_frame.bench.cards import CARDS, SECONDS_OF_300_PASSES, find_card
from torch_frame.bench.device import device_to_measure, name_of
from torch_frame.bench.models import build
from torch_frame.bench.suite import Bench, Sizes
from torch_frame.bench.table import HEAD, known_cards, lines, row, table
from torch_frame.bench.timing import Timing
from torch_frame.bench.work import compile_blocks, is_out_of_memory
from torch_frame.cli.main import main

CPU = torch.device("cpu")
without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")


def rates(median: float, p10: float = 0.0, p90: float = 0.0) -> dict[str, float]:
    return {"median": median, "p10": p10 or median, "p90": p90 or median, "calls": 9}


STORED: dict[str, Any] = {
    "card": "NVIDIA A100-SXM4-80GB",
    "device": "cuda:0",
    "driver": "580.65",
    "torch": "2.13.0",
    "matmul_tflops": {**rates(250.0), "shape": "8192x8192x8192"},
    "memory_gb_s": rates(1700.0),
    "training_images_s": {
        "fp32": rates(400.4),
        "tf32": rates(800.0),
        "bf16": rates(1200.0),
        "channels-last": rates(1582.0, 1500.0, 1600.0),
        "compiled": None,
    },
    "inference_images_s": rates(5000.0),
    "batch_size": 128,
    "training_tflop_per_step": 3.11,
    "training_tflops": rates(38.5),
    "peak_mib": 12000,
    "watts": 380.4,
    "sm_mhz": 1410.0,
    "sensors": "read",
    "verdict": {"word": "fine", "reason": "why"},
    "left_out": {"compiled": "compiling took longer than the 20 s that were left"},
    "seconds": 55.0,
}


def test_the_row_holds_the_stored_figures_beside_the_specification() -> None:
    assert row(STORED) == (
        "NVIDIA A100-SXM4-80GB",
        "580.65 / 2.13.0",
        "250 (80%)",  # of 312
        "1700 (85%)",  # of 2000
        "400, 800, 1200, 1582, - (compiling took longer than the 20 s that were left)",
        "5000",
        "12000",
        "380",
        "1500-1600",
        "1.00",  # of Lambda's 1582
    )
    assert len(row(STORED)) == len(HEAD)


def test_a_card_that_is_not_known_has_no_share() -> None:
    assert row({**STORED, "card": "Brand New"})[2] == "250 (-)"


def test_what_is_printed_has_verdict_reasons_and_sources() -> None:
    text = "\n".join(lines(STORED))
    assert "Verdict: fine (why)." in text
    assert "Training in bf16, channels-last: 38.5 TFLOP/s (3.11 TFLOP a step)." in text
    assert "Clock while it was judged: 1410 MHz (median)." in text
    assert "Not measured: compiled: compiling took longer than the 20 s that were left." in text
    assert "no accelerator" not in text
    assert "the CPU's figures" in "\n".join(lines({**STORED, "device": "cpu"}))


@pytest.mark.parametrize(
    ("driver_name", "card"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GB300", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD EPYC", None),
    ],
)
def test_cards_are_found_by_the_drivers_name(driver_name: str, card: str | None) -> None:
    found = find_card(driver_name)
    assert (None if found is None else found.name) == card


def test_every_figure_of_a_known_card_has_a_source_with_a_date() -> None:
    text = list(known_cards())
    sources = [line for line in text if line.startswith("[")]
    assert sources
    assert all("2026-11-27" in source for source in sources)
    assert all(len(line) == len(text[1]) for line in text[1 : 3 + len(CARDS)])


def test_1_7s_table_is_what_it_was() -> None:
    from torch_frame.utils.test_speed import BENCHMARK

    assert BENCHMARK is SECONDS_OF_300_PASSES
    assert BENCHMARK[64, 3, 224, 224]["vgg16"] == {"RTX-3090": 29, "V100": 28, "A100": 22}


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert list(table([("a", "b"), ("long", "c")])) == ["| a    | b |", "|------|---|", "| long | c |"]


# ---------------------------------------------------------------- measured here

SMALL = Sizes(1, ((64, 64, 64),), 2**16, seconds=0.01, judged_s=0.02, warm_up=1, min_calls=2)


def test_a_bench_on_the_cpu_measures_the_cpu() -> None:
    found = Bench(CPU, sizes=SMALL).run()
    assert found["device"] == "cpu"
    assert found["card"].endswith("thread)" if torch.get_num_threads() == 1 else "threads)")
    assert found["matmul_tflops"]["median"] >= 0
    assert found["training_images_s"]["bf16"]["median"] > 0
    assert set(found["left_out"]) == {"tf32", "compiled"}
    assert found["verdict"]["word"] in ("fine", "throttled", "shared")
    assert json.loads(json.dumps(found)) == found


def test_what_has_no_time_left_is_left_out_and_said() -> None:
    started = time.perf_counter()
    found = Bench(CPU, sizes=SMALL, limit_s=0.0).run()
    assert time.perf_counter() - started < 10
    assert found["left_out"]["fp32"] == "no time was left of the 0 s"
    assert found["verdict"] is None
    no = "- (no time was left)"
    assert row(found)[2:8] == ("-", "-", f"{no}, -, {no}, {no}, -", "-", "-", "-")
    assert found["left_out"]["copy"] == "no time was left of the 0 s"
    found = Bench(CPU, sizes=SMALL, used_s=59.0).run()  # Python's start took nearly all of the minute
    assert found["left_out"]["copy"] == "no time was left of the 60 s"
    assert 59 < found["seconds"] < 69


class Slow(Bench):
    """Remembers the time that each part may take, and takes none."""

    def _time(self, name: str, work: Any, share_s: float) -> Timing:
        self.shares = {**getattr(self, "shares", {}), name: share_s}
        return Timing([1e-3] * 6)


def test_every_part_has_its_share_of_the_time_that_is_left() -> None:
    bench = Slow(CPU, sizes=SMALL, limit_s=68.0)
    bench.run()
    shares = bench.shares
    # 60 s are for parts that weigh 1 (matmul), 1 (copy), 2, 2, 4 and 1; here none of them takes its share
    assert shares["matmul 64x64x64"] == pytest.approx(60 / 11, rel=0.1)
    assert shares["copy"] == pytest.approx(60 / 10, rel=0.1)
    assert shares["fp32"] == pytest.approx(60 * 2 / 9, rel=0.2)
    assert "inference" in shares


def test_a_part_that_lasts_longer_than_what_is_left_is_not_begun() -> None:
    class Emulated(Bench):
        def _time(self, name: str, work: Any, share_s: float) -> Timing:
            return Timing([40.0 if name == "bf16" else 1.0])

    found = Emulated(CPU, sizes=SMALL).run()
    assert found["left_out"]["channels-last"] == "no time was left of the 60 s"
    assert "inference" not in found["left_out"]
    assert found["verdict"] is None


class Narrow(Bench):
    """Has memory for a batch of 2, and in fp32 for one of 8."""

    def _time(self, name: str, work: Any, share_s: float) -> Timing:
        if self.batch_size > 2 and name not in ("copy", "fp32"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Timing([0.5] * 6)


def test_a_batch_that_does_not_fit_is_halved_and_each_figure_is_of_its_own_batch() -> None:
    found = Narrow(CPU, sizes=Sizes(8, (), 2**16, 0.01, 0.01, 1, 2)).run()
    assert found["batch_sizes"] == {"fp32": 8, "bf16": 2, "channels-last": 2, "inference": 2}
    assert found["training_images_s"]["fp32"]["median"] == 16
    assert found["training_images_s"]["bf16"]["median"] == 4
    assert found["batch_size"] == 2
    assert set(found["left_out"]) == {"tf32", "compiled"}


def test_a_call_that_does_not_come_back_is_given_up() -> None:
    class Hangs(Bench):
        def _measure_parts(self, sizes: Sizes) -> None:
            self.timings["fp32"], self.batch_sizes["fp32"] = Timing([0.5] * 6), 1
            self.to_come = ["bf16", "inference"]
            time.sleep(30)

    started = time.perf_counter()
    bench = Hangs(CPU, sizes=SMALL, used_s=56.0)
    found = bench.run()
    assert time.perf_counter() - started < 20
    assert bench.abandoned
    assert found["training_images_s"]["fp32"]["median"] == 2
    assert found["left_out"] == dict.fromkeys(("bf16", "inference", "compiled"), "no time was left of the 60 s")


def test_an_error_of_ours_reaches_the_caller() -> None:
    class Wrong(Bench):
        def _time(self, name: str, work: Any, share_s: float) -> Timing:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Wrong(CPU, sizes=SMALL).run()


def test_too_few_calls_give_no_verdict_and_it_is_said() -> None:
    class OneCall(Bench):
        def _time(self, name: str, work: Any, share_s: float) -> Timing:
            return Timing([0.5])

    found = OneCall(CPU, sizes=SMALL).run()
    assert found["verdict"] is None
    assert found["left_out"]["verdict"] == "it needs 6 calls, and there was time for 1"


def test_what_does_not_fit_at_all_is_in_the_row() -> None:
    trainings = {**STORED["training_images_s"], "fp32": None}
    left_out = {"fp32": "out of memory with a batch of 1", "compiled": "compiling failed: no compiler"}
    found = {**STORED, "training_images_s": trainings, "left_out": left_out}
    assert row(found)[4] == "- (out of memory), 800, 1200, 1582, - (compiling failed: no compiler)"


def test_the_allocators_own_errors_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by torch itself while it compiles
def test_blocks_are_compiled_once_for_each_kind() -> None:
    counter = CompileCounter()
    model, images = build("resnet50"), torch.randn(2, 3, 32, 32)
    expected = model(images)
    expected.sum().backward()
    gradient = model[-1].weight.grad.clone()
    model.zero_grad()
    compile_blocks(model, backend=counter)
    found = model(images)
    found.sum().backward()
    assert counter.frame_count == 8  # of 16 blocks
    assert torch.equal(found, expected)
    assert torch.equal(model[-1].weight.grad, gradient)


def test_the_process_knows_its_age() -> None:
    started = time.perf_counter()
    code = "import time; time.sleep(1); from torch_frame.cli.bench import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert 1 < float(done.stdout) < time.perf_counter() - started + 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_goes_on_compiling_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    class Remembered(subprocess.Popen[str]):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            begun.append(self.pid)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled.subprocess, "Popen", Remembered)
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="compiling took longer than the 20 s"):
        compiled.time_compiled(CPU, 1, 0.01, limit_s=20)
    assert time.perf_counter() - started < 25
    time.sleep(1)
    stats = [path.read_text(errors="replace") for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    states = [stat.rpartition(")")[2].split() for stat in stats]  # proc(5): state, parent, group, ...
    assert not [state for state in states if int(state[2]) == begun[0] and state[0] != "Z"]


def test_compiling_is_given_up_when_its_time_is_over() -> None:
    with pytest.raises(RuntimeError, match="compiling took longer than the 0 s that were left"):
        compiled.time_compiled(CPU, 1, 0.01, limit_s=0.1)


def test_a_failure_in_the_other_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="compiling failed: ValueError: invalid literal"):
        compiled.time_compiled(torch.device("cpu"), "nonsense", 0.01, limit_s=60)  # type: ignore[arg-type]


@without_accelerator
def test_the_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_frame.bench.suite.ON_CPU", SMALL)
    assert main(["bench", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@without_accelerator
def test_the_command_prints_the_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_frame.bench.suite.ON_CPU", SMALL)
    assert main(["bench"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| card")
    assert "torch sees no accelerator here: these are the CPU's figures." in printed


# ---------------------------------------------------------------- gpu_cnn_speed


@without_accelerator
def test_gpu_cnn_speed_prints_and_returns_its_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_frame.bench.cnn_speed.SECONDS", 0.01)
    found = torch_frame.gpu_cnn_speed("resnet18", (2, 3, 32, 32))
    for part in ("inference", "training"):
        figures = found[part]
        assert figures["images_s"]["median"] == pytest.approx(2 / figures["ms"] * 1e3, rel=0.01)
        assert figures["tflops"] == pytest.approx(figures["tflop"] / figures["ms"] * 1e3, rel=0.01)
    assert found["parameters"] == 11_689_512
    printed = capsys.readouterr().out
    assert "torch sees no accelerator here, so the CPU was timed." in printed
    assert "images/s" in printed


@without_accelerator
def test_1_7s_seconds_are_shown_as_history(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_frame.bench.cnn_speed import _lines

    part = {"images_s": rates(10.0), "ms": 1.0, "tflops": 1.0}
    size = (16, 3, 224, 224)
    text = "\n".join(
        _lines(
            {"model": "vgg16", "input_size": size, "card": "X", "device": "cuda:0", "inference": part, "training": part}
        )
    )
    assert "timed in another way and not to be compared: RTX-3090 9 s, V100 7 s, A100 5 s" in text


@without_accelerator
def test_sizes_may_be_numpys_or_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_frame.bench.cnn_speed.SECONDS", 0.01)
    found = torch_frame.gpu_cnn_speed("mobilenet_v2", np.array([2, 3, 32, 32]))  # type: ignore[arg-type]
    assert found["input_size"] == (2, 3, 32, 32)
    assert json.loads(json.dumps(found))["input_size"] == [2, 3, 32, 32]


@pytest.mark.parametrize(("name", "size"), [("vgg16", (2, 3, 16, 16)), ("resnet18", (1, 3, 32, 32))])
def test_images_that_a_network_cannot_take_are_an_error_that_says_why(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=rf"input_size is \({size[0]}, 3, .*; {name} cannot be trained on it: "):
        torch_frame.gpu_cnn_speed(name, size)


@pytest.mark.parametrize("index", ["0", "cuda:0", 0.5])
def test_an_index_of_another_type_is_an_error(index: Any) -> None:
    with pytest.raises(ValueError, match=r"gpu_id is .*; it has to be a whole number, or None"):
        torch_frame.gpu_cnn_speed("resnet18", (2, 3, 32, 32), index)


@pytest.mark.parametrize("size", [(16, 3, 224), (16, 1, 224, 224), (0, 3, 8, 8), (1.5, 3, 8, 8), 16, None, "abcd"])
def test_a_size_that_is_no_batch_of_images_is_an_error(size: Any) -> None:
    with pytest.raises(ValueError, match="it has to be"):
        torch_frame.gpu_cnn_speed("resnet18", size)


def test_an_unknown_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="model_type is 'alexnet'"):
        torch_frame.gpu_cnn_speed("alexnet")


def test_a_card_that_is_not_there_is_an_error() -> None:
    if not torch.accelerator.is_available():
        assert device_to_measure(0) == CPU  # as 1.7: without CUDA the CPU
    else:
        with pytest.raises(ValueError, match="gpu_id is 99"):
            device_to_measure(99)


def test_the_cpu_has_a_name() -> None:
    assert "(CPU, " in name_of(CPU)
