"""Everything that needs an accelerator, in one command: `make gpu`. About three minutes, at most four.

The parts, the results are written after each of them:

- tests: those marked cuda (mixed precision, no wait of the host in a step, prefetching, bitwise resume, ...); they need pytest.
- resume: runs that were stopped inside an epoch and resumed, bitwise the same as those that were not, compiled and not.
- steps: ResNet-50 (bf16, channels-last) and a small transformer (bf16) by Trainer beside a hand-written loop of the same work,
  interleaved, with a wait for the device at each epoch's end; `raw again` beside `raw` is the error bar. A batch
  that does not fit into memory is halved until it does, which is said; a slow device does fewer steps and rounds.
- host_waits: calls for which the host waits for the device, between two points at which LoggerHook reads.
- bench: `torch-frame bench --json`.
- prefetch: batches in pageable and in pinned memory, copied ahead or not.
- save: how long a save keeps the thread that trains, for a state on the device.

    make gpu ARGS="--only steps,save --output results.json"
    PYTHONPATH=src python3 benchmarks/gpu.py

Exit status: 0; 1 if a part failed or a test did; 3 if there is no accelerator, or no torch.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    print(f"make gpu: {sys.executable} has no torch (exit status 3). Name another Python: make gpu PYTHON=...")
    sys.exit(3)

from _beside import beside_raw, default_hooks, in_turn, num_steps_in_time, ours, raw, until_it_fits, wait
from _networks import Made, images, moved, resnet, transformer
from _report import print_table, summary
from checkpoint import Savers, big_model

from torch_frame import Trainer
from torch_frame.bench.device import device_to_measure, name_of
from torch_frame.bench.table import HEAD, row, table

ROOT = Path(__file__).parents[1]
NO_DEVICE = 3


# ---------------------------------------------------------------- tests


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """The tests marked cuda, in processes of their own."""
    missing = [name for name in ("pytest", "pytest_timeout", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return {"not_run": f"{', '.join(missing)} not installed"}
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = ["-n", "6"] if importlib.util.find_spec("xdist") is not None else []
        command = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-q", "-m", "cuda", *parallel]
        done = run(
            [*command, f"--junitxml={report}", *map(str, files)],
            timeout=min(options.tests_limit, options.ends_at - time.perf_counter()),
        )
        if not report.exists():
            return {"failed": [f"pytest ended with {done.returncode}"], "output": (done.stdout + done.stderr)[-3000:]}
        return test_results(report, done)


def test_results(report: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    found: dict[str, Any] = {"passed": len(cases) - len(bad) - skipped, "skipped": skipped}
    found["failed"] = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    print(f"  {found['passed']} passed, {skipped} skipped, {len(bad)} failed {found['failed'] or ''}")
    if bad or done.returncode != 0:
        found["output"] = done.stdout[-6000:]
    return found


def run(command: list[str], timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---------------------------------------------------------------- resumed bitwise?


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """The weights that differ between a run that was stopped and resumed, and one that was not."""
    kinds = ["fp32", "bf16"] if options.device.type == "cpu" else ["fp32", "bf16", "compiled"]
    command = [sys.executable, str(ROOT / "benchmarks" / "_resumed.py"), str(options.device), *kinds]
    done = run(command, timeout=max(options.ends_at - time.perf_counter(), 1.0), CUBLAS_WORKSPACE_CONFIG=":4096:8")
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-2000:])
    differing: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    for kind, names in differing.items():
        print(f"  {kind}: " + (f"differs in {', '.join(names)}" if names else "bitwise"))
    return {"differing": differing, "failed": [kind for kind, names in differing.items() if names]}


# ---------------------------------------------------------------- steps beside the raw loop


def steps(options: argparse.Namespace) -> dict[str, Any]:
    device, size = options.device, options.size

    def pictures(batch_size: int) -> Any:
        return moved(images(batch_size, size["pixels"]), device)

    def sequences(batch_size: int) -> Any:
        tokens = torch.randint(0, 8192, (batch_size, 2, 512))
        return moved((tokens[:, 0], tokens[:, 1]), device)

    decoder = functools.partial(transformer, width=size["width"])
    work: list[tuple[str, Made, Callable[[int], Any], int, int]] = [
        ("resnet50", resnet, pictures, size["images"], size["steps"]),
        ("transformer", decoder, sequences, size["sequences"], 2 * size["steps"]),
    ]
    found: dict[str, Any] = {}
    for place, (name, make, batch_of, batch_size, num_steps) in enumerate(work):
        ends_at = time.perf_counter() + (options.ends_at - time.perf_counter()) / (len(work) - place)

        def beside(
            batch_size: int,
            make: Made = make,
            batch_of: Callable[[int], Any] = batch_of,
            most: int = num_steps,
            ends_at: float = ends_at,
        ) -> dict[str, Any]:
            batch = batch_of(batch_size)
            num = num_steps_in_time(make, batch, most, options, ends_at)
            return beside_raw(make, [batch] * num, options, ends_at)

        found[name] = until_it_fits(beside, batch_size)
    return found


# ---------------------------------------------------------------- does the host wait?


def host_waits(options: argparse.Namespace) -> dict[str, Any]:
    """Calls that make the host wait, as torch's own check counts them, in an epoch without a point at which hooks read."""
    device = options.device
    if device.type != "cuda":
        return {"not_run": f"torch cannot say it of {device.type}"}
    batches = [tuple(part.pin_memory() for part in images(8, 64))] * 40
    model, optimizer = resnet(device)

    class Watched(Trainer):
        def train_one_iter(self, batch: Any) -> Any:
            if self.inner_iter == 2:  # the first steps find memory and kernels
                torch.cuda.set_sync_debug_mode("warn")
            return super().train_one_iter(batch)

        def _finish_epoch(self) -> None:
            torch.cuda.set_sync_debug_mode("default")
            super()._finish_epoch()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            Watched(model, optimizer, None, batches, 1, folder, precision="bf16", hooks=default_hooks()).train(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(one.filename).name}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)
    ]
    print(f"  calls for which the host waits, in {len(batches) - 2} steps: {len(places)}")
    return {"steps": len(batches) - 2, "waits": len(places), "places": sorted(set(places))}


# ---------------------------------------------------------------- prefetching


def prefetch(options: argparse.Namespace) -> dict[str, Any]:
    """Each step's batch comes from host memory; "on the device" is the same without any copy."""
    return until_it_fits(lambda batch_size: prefetched(batch_size, options), options.size["images"])


def prefetched(batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    device, size = options.device, options.size
    repeats = max(size["steps"] // 4, 1)
    pageable = [images(batch_size, size["pixels"]) for _ in range(4)]
    pinned = [tuple(part.pin_memory() for part in batch) for batch in pageable] if device.type == "cuda" else pageable
    there = [moved(batch, device) for batch in pageable] * repeats
    pageable, pinned = pageable * repeats, pinned * repeats
    with tempfile.TemporaryDirectory() as folder:
        rows = {
            "raw": raw(resnet, there, device),  # `summary` puts the others beside this row
            "raw, pageable": raw(resnet, pageable, device, move=True),
            "raw, pinned": raw(resnet, pinned, device, move=True),
            "torch-frame, pageable": ours(resnet, pageable, device, [], f"{folder}/a", prefetch=False),
            "torch-frame, pageable, prefetched": ours(resnet, pageable, device, [], f"{folder}/b"),
            "torch-frame, pinned": ours(resnet, pinned, device, [], f"{folder}/c", prefetch=False),
            "torch-frame, pinned, prefetched": ours(resnet, pinned, device, [], f"{folder}/d"),
        }
        times = in_turn(rows, max(options.rounds - 2, 2), len(pageable), options.ends_at)
        found = summary(times, "us_per_step")
    found["on the device (raw)"] = found.pop("raw")
    print_table(found, "us_per_step", width=36)
    return {"megabytes": round(pageable[0][0].nbytes / 1e6, 1), "steps": len(pageable), **found}


# ---------------------------------------------------------------- saves


def save(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds for which the thread that trains is kept; the device is done with its work before."""
    return {f"{megabytes} MB": saves_of(megabytes, options.device) for megabytes in options.size["megabytes"]}


def saves_of(megabytes: int, device: torch.device) -> dict[str, Any]:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        savers = Savers(*big_model(megabytes, device), folder, None)
        rows = {
            "asynchronous, first save": savers.ours_async_first,
            "asynchronous, buffers reused": savers.ours_async,
            "synchronous": savers.ours_sync,
            "torch.save": functools.partial(savers.torch_save, sync=False),
        }
        for number in range(3):
            for name, begin in rows.items():
                savers.settle()
                wait(device)
                started = time.perf_counter()
                saving = begin()
                blocked_s = time.perf_counter() - started
                saving.finish()
                if number > 0:  # the first round warms up
                    found.setdefault(name, []).append(round(blocked_s * 1e3, 2))
    for name, values in found.items():
        print(f"  {megabytes} MB, {name:<30} {' '.join(f'{value:8.1f}' for value in values)} ms")
    return found


# ---------------------------------------------------------------- the bench, and all together


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """The command's own figures, in a process of its own, so that nothing of the parts before is on the device."""
    if options.device.type != "cpu":
        torch.accelerator.empty_cache()
    code = "import sys; from torch_frame.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "bench", "--json", "--limit", str(options.bench_limit)]
    done = run(command, timeout=options.bench_limit + 30)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-2000:])
    found: dict[str, Any] = json.loads(done.stdout)
    print("\n".join(table([HEAD, row(found)])))
    print(f"  verdict {found['verdict']}, left out {found['left_out']}, {found['seconds']} s")
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests,
    "resume": resume,
    "steps": steps,
    "host_waits": host_waits,
    "bench": bench,
    "prefetch": prefetch,
    "save": save,
}
LEAST_S = {"tests": 30, "resume": 15, "steps": 30, "host_waits": 5, "bench": 60, "prefetch": 15, "save": 15}
"""Seconds that the parts before leave to each one, so that a slow device does something of all."""
ON_DEVICE = {
    "images": 128, "pixels": 224, "steps": 12, "sequences": 32, "width": 768, "megabytes": (300, 900),
}  # fmt: skip
SMALL = {"images": 2, "pixels": 32, "steps": 2, "sequences": 1, "width": 64, "megabytes": (13,)}
"""To try the script without an accelerator."""


def main() -> int:
    options = parsed_options()
    if options.device.type == "cpu" and not options.try_on_cpu:
        print(
            f"make gpu: torch {torch.__version__} sees no accelerator on this machine, so nothing was run (exit status 3)."
        )
        return NO_DEVICE
    setting = {
        "date": datetime.date.today().isoformat(),
        "card": name_of(options.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(f"{setting['card']}, torch {setting['torch']}; results go to {options.output}")
    parts: dict[str, Any] = {}
    started = time.perf_counter()
    for name in options.only:
        left = options.limit - (time.perf_counter() - started)
        for_later = sum(LEAST_S[later] for later in options.only[options.only.index(name) + 1 :])
        options.ends_at = time.perf_counter() + max(left - for_later, min(left, LEAST_S[name]))
        parts[name] = carried_out(name, options, left)
        write(options.output, {"setting": setting, "seconds": round(time.perf_counter() - started, 1), "parts": parts})
    not_run = {name: found["not_run"] for name, found in parts.items() if "not_run" in found}
    failed = [name for name, found in parts.items() if found.get("error") or found.get("failed")]
    for name, reason in not_run.items():
        print(f"Not run: {name}: {reason}.")
    end = f"Failed: {', '.join(failed)}." if failed else f"All {'other ' if not_run else ''}parts are done."
    print(f"{time.perf_counter() - started:.0f} s. {end}")
    return 1 if failed else 0


def carried_out(name: str, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """A part's results; an error does not keep the later parts from being run."""
    print(f"== {name}", flush=True)
    if left_s < 20:
        return {"error": f"not run: {left_s:.0f} s of {options.limit} s were left"}
    options.bench_limit = int(min(options.bench_limit, options.ends_at - time.perf_counter()))
    started = time.perf_counter()
    try:
        found = PARTS[name](options)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        print(found["traceback"])
    return {"seconds": round(time.perf_counter() - started, 1), **found}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="the JSON file (default: benchmarks/results/<date>-gpu-<card>.json)"
    )
    parser.add_argument("--only", type=part_names, default=list(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7, help="of steps (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=240, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--bench-limit", type=int, default=75, help="seconds for the bench (default: %(default)s)")
    parser.add_argument("--tests-limit", type=int, default=100, help="seconds for the tests (default: %(default)s)")
    parser.add_argument(
        "--try-on-cpu", action="store_true", help="run the script with tiny networks, for those who change it"
    )
    options = parser.parse_args()
    options.device = device_to_measure()
    options.size = SMALL if options.device.type == "cpu" else ON_DEVICE
    if options.output is None:
        card = re.sub(r"[^a-z0-9]+", "-", name_of(options.device).lower()).strip("-")
        options.output = ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}-gpu-{card}.json"
    return options


def part_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is no part; the parts are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
