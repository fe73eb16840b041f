"""`torch-frame inspect`: what a checkpoint file holds, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch_frame.checkpoint.inspect import inspect as described_file

_KINDS = {
    "state": "a whole training state, to resume from",
    "weights": "weights, to evaluate or to begin from",
    "other": "tensors or plain values of another program",
    "unreadable": "cannot be read",
}


def inspect(path: str, *, as_json: bool = False, weights: bool = False) -> int:
    """Print what `path` holds.

    Args:
        path: of a file.
        as_json: one JSON object instead of a table.
        weights: a line for each tensor of the model as well.

    Returns:
        0; 1 where the file is damaged or cannot be read.
    """
    described = described_file(path)
    if as_json:
        print(json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False, default=str))
    else:
        rows = list(_rows(described))
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")
        if weights:
            _print_weights(described.get("weights", []))
    return 0 if described["digest"] != "damaged" and described["kind"] != "unreadable" else 1


def _rows(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", f"{described['file']}, {_size(described['bytes'])}"
    yield "kind", _KINDS[described["kind"]]
    yield "digest", f"{described['digest']}: {described['digest_words']}"
    if "problem" in described:
        yield "problem", described["problem"]
    if "versions" in described:
        versions = described["versions"]
        names = f"torch-frame {versions['torch_frame']}, torch {versions['torch']}, format {versions['format']}"
        yield "written by", names
        yield from _state_rows(described)
    if "num_parameters" in described:
        count, size = f"{described['num_parameters']:,} numbers", _size(described["num_bytes"])
        yield "model", f"{len(described['weights'])} tensors, {count}, {size}, {', '.join(described['dtypes'])}"
    if described.get("left_out"):
        names = described["left_out"]
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        yield "not in it", f"{len(names)} frozen parameters that the script brings (save_frozen=False): {first}"
    for name, part in described.get("parts", {}).items():
        if name != "model":
            yield name, f"{part['tensors']} tensors, {_size(part['bytes'])}"


def _state_rows(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    done = described["progress"]
    place = (
        "all batches of the next one trained" if done["epoch_trained"] else f"{done['inner_iter']} batches of the next"
    )
    yield "step", f"{done['iter']} iterations, {done['num_updates']} updates"
    yield "epoch", f"{done['epoch']} done, {place}"
    yield "precision", str(described["precision"])
    yield "seed", str(described["seed"])
    if described["data_length"] is not None:
        yield "data", "{:,} {} an epoch".format(*described["data_length"])
    if described["classes"] is not None:
        yield "made of", ", ".join(f"{what} {name}" for what, name in described["classes"].items())
    yield "hooks", ", ".join(described["hooks"]) or "none with a state"
    if described["environment"]:
        yield "environment", ", ".join(f"{k} {v}" for k, v in described["environment"].items() if k != "torch")


def _print_weights(weights: list[Mapping[str, Any]]) -> None:
    width = max((len(str(tensor["name"])) for tensor in weights), default=0)  # a name may be a number
    print()
    for tensor in weights:
        print(f"{tensor['name']!s:<{width}}  {tensor['dtype']:<10} {tensor['shape']}")


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
