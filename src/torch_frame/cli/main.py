"""`torch-frame`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch_frame import __version__
from torch_frame.errors import TorchFrameError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words behind `torch-frame`; None: those of this process.

    Returns:
        The exit status: 0 where all went well, 1 where the command failed, 2 for words it doesn't know.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (TorchFrameError, ModuleNotFoundError, OSError) as error:
        print(f"torch-frame: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torch-frame", description="A PyTorch training framework.")
    parser.add_argument("--version", action="version", version=f"torch-frame {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="train on real handwritten digits, kill a second run half way, and resume it"
    )
    demo.add_argument("--work-dir", default="demo_runs", help="where the runs go (default: %(default)s)")
    demo.add_argument("--epochs", type=_positive, default=20, help="epochs of each run (default: %(default)s)")
    demo.set_defaults(run=_run_demo)
    bench = commands.add_parser(
        "bench", help="measure what the accelerator, or the CPU, can do: one row, within a minute"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    bench.add_argument(
        "--limit", type=_positive, default=60, metavar="SECONDS", help="for everything (default: %(default)s)"
    )
    bench.set_defaults(run=_run_bench)
    convert = commands.add_parser(
        "convert", help="write a checkpoint of torch-frame 1.7 as one that load_checkpoint continues"
    )
    convert.add_argument("old", metavar="OLD.pth", help="a latest.pth of 1.7; it stays as it is")
    convert.add_argument("new", metavar="NEW.pth", help="the file to write")
    convert.add_argument(
        "--ema", metavar="BEST.pth", help="EMA's weights of the same epoch, which 1.7 kept in best.pth"
    )
    convert.add_argument("--force", action="store_true", help="write over NEW.pth where it exists")
    convert.set_defaults(run=_run_convert)
    inspect = commands.add_parser("inspect", help="say what a checkpoint file holds, and whether it is whole")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    inspect.add_argument("--weights", action="store_true", help="list each tensor of the model as well")
    inspect.set_defaults(run=_run_inspect)
    show = commands.add_parser("show", help="the table and the result of a run; of several, what differs, side by side")
    show.add_argument("runs", metavar="RUN", nargs="+", help="the work dir of a run, finished or under way")
    show.set_defaults(run=_run_show)
    return parser


def _run_demo(options: argparse.Namespace) -> int:
    from torch_frame.cli.demo import demo  # scikit-learn and matplotlib are extras

    return demo(options.work_dir, options.epochs)


def _run_bench(options: argparse.Namespace) -> int:
    from torch_frame.cli.bench import bench

    return bench(as_json=options.json, limit_s=options.limit)


def _run_convert(options: argparse.Namespace) -> int:
    from torch_frame.cli.convert import convert  # each command imports what it needs alone

    return convert(options.old, options.new, ema=options.ema, force=options.force)


def _run_inspect(options: argparse.Namespace) -> int:
    from torch_frame.cli.inspect import inspect

    return inspect(options.file, as_json=options.json, weights=options.weights)


def _run_show(options: argparse.Namespace) -> int:
    from torch_frame.cli.show import show

    return show(options.runs)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
