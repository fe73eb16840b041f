"""The bench's row, to paste, and the known cards beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch_frame.bench.cards import A100_SXM_80GB, CARDS, Card, Figure, find_card
from torch_frame.bench.suite import NO_TF32, NO_TIME, NOT_COMPILED, OUT_OF_MEMORY, TRAINING_KINDS

HEAD = (
    "card", "driver / torch", "matmul bf16 TFLOP/s (% of spec)", "memory GB/s (% of spec)",
    f"ResNet-50 training images/s {', '.join(TRAINING_KINDS)}", "inference", "peak MiB", "W", "p10-p90", "x A100",
)  # fmt: skip
KNOWN_HEAD = (
    "card",
    "bf16 TFLOP/s spec",
    "memory GB/s spec",
    "matmul bf16 TFLOP/s",
    "ResNet-50 fp16",
    "ResNet-50 fp32",
)
NOTHING = "-"


def row(found: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of the bench's row.

    Args:
        found: from `torch_frame.bench.suite.figures`.
    """
    card = find_card(found["card"])
    judged = found["training_images_s"]["channels-last"]
    trainings = (_images_s(found, kind) for kind in TRAINING_KINDS)
    return (
        found["card"],
        f"{found['driver'] or NOTHING} / {found['torch']}",
        _of_spec(found["matmul_tflops"], None if card is None else card.bf16_tflops),
        _of_spec(found["memory_gb_s"], None if card is None else card.memory_gb_s),
        ", ".join(trainings),
        _whole(found["inference_images_s"]),
        NOTHING if found["peak_mib"] is None else str(found["peak_mib"]),
        NOTHING if found["watts"] is None else f"{found['watts']:.0f}",
        NOTHING if judged is None else f"{_number(judged['p10'])}-{_number(judged['p90'])}",
        times_a100(judged),
    )


def times_a100(judged: Mapping[str, float] | None) -> str:
    """Images/s of the bf16 channels-last training over those that Lambda measured on an A100 SXM 80GB (fp16 autocast).

    >>> times_a100({"median": 3164.0})
    '2.00'
    """
    assert A100_SXM_80GB.resnet50_fp16 is not None
    return NOTHING if judged is None else f"{judged['median'] / A100_SXM_80GB.resnet50_fp16.value:.2f}"


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """All that the command prints: the row, how to read it, the verdict, and the known cards with their sources."""
    yield from table([HEAD, row(found)])
    yield ""
    yield (
        f"Medians. ResNet-50 with a batch of {found['batch_size']} that is on the device; channels-last is in bf16 too, and "
        "compiled is both of them, block by block. Inference, peak memory, W and p10-p90 (images/s) are those of bf16, "
        "channels-last."
    )
    if found["training_tflops"] is not None:
        yield (
            f"Training in bf16, channels-last: {_number(found['training_tflops']['median'])} TFLOP/s "
            f"({found['training_tflop_per_step']} TFLOP a step)."
        )
    yield "x A100: of Lambda's 1582 images/s in fp16 on an A100 SXM 80GB."
    if found["device"] == "cpu":
        yield "torch sees no accelerator here: these are the CPU's figures."
    if found["verdict"] is not None:
        yield f"Verdict: {found['verdict']['word']} ({found['verdict']['reason']})."
    if found["sm_mhz"] is not None:
        yield f"Clock while it was judged: {found['sm_mhz']:.0f} MHz (median)."
    if found["sensors"] != "read":
        yield found["sensors"]
    for name, reason in found["left_out"].items():
        yield f"Not measured: {name}: {reason}."
    yield f"{found['seconds']} s."
    yield ""
    yield from known_cards()


def known_cards(cards: Sequence[Card] = CARDS) -> Iterator[str]:
    """What others have measured, a number behind each figure for its source below."""
    sources: dict[str, int] = {}

    def cell(figure: Figure | None) -> str:
        if figure is None:
            return NOTHING
        note = f" ({figure.note})" if figure.note else ""
        return f"{figure.value:g}{note} [{sources.setdefault(figure.source, len(sources) + 1)}]"

    rows = [
        (
            card.name,
            *map(
                cell, (card.bf16_tflops, card.memory_gb_s, card.matmul_tflops, card.resnet50_fp16, card.resnet50_fp32)
            ),
        )
        for card in cards
    ]
    yield "Known cards (measured by others, with other software; specifications without sparsity):"
    yield from table([KNOWN_HEAD, *rows])
    for source, number in sources.items():
        yield f"[{number}] {source}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as Markdown, the first one as the head.

    >>> for line in table([("a", "b"), ("1", "22")]):
    ...     print(line)
    | a | b  |
    |---|----|
    | 1 | 22 |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, cells in enumerate(rows):
        yield "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _of_spec(measured: Mapping[str, float] | None, spec: Figure | None) -> str:
    if measured is None:
        return NOTHING
    share = NOTHING if spec is None else f"{measured['median'] / spec.value:.0%}"
    return f"{_number(measured['median'])} ({share})"


def _images_s(found: Mapping[str, Any], kind: str) -> str:
    """Of a training; if there is no figure, why not, unless no device of this type has one."""
    measured = found["training_images_s"][kind]
    reason = found["left_out"].get(kind, "")
    if measured is not None or reason in ("", NO_TF32, NOT_COMPILED):
        return _whole(measured)
    short = next((sign for sign in (OUT_OF_MEMORY, NO_TIME) if reason.startswith(sign)), reason.split(";")[0])
    return f"{NOTHING} ({short})"


def _whole(measured: Mapping[str, float] | None) -> str:
    return NOTHING if measured is None else _number(measured["median"])


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
