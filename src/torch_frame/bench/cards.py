"""What is known of cards: their specification, and what others have measured, each figure with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

ML_ENGINEERING = "stas00/ml-engineering, compute/accelerator/README.md, read 2026-11-27"
"""Stas Bekman's tables of specifications without sparsity, and of the best matrix product found on each card ("MAMF")."""
LAMBDA = "lambdal/deeplearning-benchmark, pytorch/csv_v1_v2 at 67fdf51, read 2026-11-27"
"""Lambda's images/s of NVIDIA's ResNet-50 in NGC's containers: fp16 is autocast, fp32 is TF32 on cards that have it."""
AIME = "aime.info, Deep Learning GPU Benchmarks, read 2026-11-27"
TORCH_FRAME_1_7 = "torch-frame 1.7.5, torch_frame/utils/test_speed.py, 2023-12"


class Figure(NamedTuple):
    """A number with where it is from, and with which software it was measured."""

    value: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A card, and what is known of it; None: not known.

    Attributes:
        name: as people write it.
        pattern: finds the card in the name that the driver gives; the first card of `CARDS` that fits counts.
        bf16_tflops: specification, dense, TFLOP/s.
        memory_gb_s: specification, GB/s.
        matmul_tflops: the best bf16 matrix product that was measured, TFLOP/s.
        resnet50_fp16: measured training images/s, fp16 autocast.
        resnet50_fp32: measured training images/s.
    """

    name: str
    pattern: str
    bf16_tflops: Figure | None = None
    memory_gb_s: Figure | None = None
    matmul_tflops: Figure | None = None
    resnet50_fp16: Figure | None = None
    resnet50_fp32: Figure | None = None


def _spec(value: float) -> Figure:
    return Figure(value, ML_ENGINEERING)


def _matmul(value: float, torch_version: str, note: str = "") -> Figure:
    return Figure(value, ML_ENGINEERING, f"torch {torch_version}{note}")


def _lambda(value: float, software: str = "NGC 2022-23") -> Figure:
    return Figure(value, LAMBDA, software)


A100_SXM_80GB = Card(
    "A100 SXM 80GB",
    r"A100-SXM.*80GB",
    _spec(312),
    _spec(2000),
    _matmul(271.2, "2.6.0"),
    _lambda(1582),
    _lambda(1066),
)
"""What the bench's last column compares with."""

CARDS = [
    Card("GB200", r"GB200", _spec(2500), _spec(8000), _matmul(1822.0, "2.10.0.dev")),
    Card("B300", r"\bB300", _spec(2250), None, _matmul(1769.0, "2.9.1")),
    Card("B200", r"\bB200", _spec(2250), _spec(8000), _matmul(1745.0, "2.7.1")),
    Card("GH200", r"GH200", _spec(989), None, _matmul(828.6, "2.6.0", ", 900 W")),
    Card(
        "H200 SXM",
        r"H200(?!.*NVL)",
        _spec(989),
        _spec(4800),
        _matmul(794.5, "2.7.0", ": H100's"),
    ),
    Card(
        "H100 PCIe", r"H100 PCIe", _spec(756), _spec(2000), None, _lambda(1976, "NGC 24.03"), _lambda(1248, "NGC 24.03")
    ),
    Card(
        "H100 SXM",
        r"H100 80GB",
        _spec(989),
        _spec(3350),
        _matmul(794.5, "2.7.0"),
        _lambda(2791, "NGC 24.03"),
        _lambda(1895, "NGC 24.03"),
    ),
    A100_SXM_80GB,
    Card(
        "A100 PCIe 80GB",
        r"A100.*80GB.*PCIe",
        _spec(312),
        None,
        _matmul(252.9, "2.5.1"),
        _lambda(1527),
        _lambda(1014),
    ),
    Card("A100 PCIe 40GB", r"A100-PCIE-40GB", _spec(312), None, None, _lambda(1396), _lambda(882)),
    Card("A100 SXM 40GB", r"A100-SXM.*40GB", _spec(312)),
    Card("L40S", r"L40S", _spec(362), _spec(860)),
    Card("RTX 6000 Ada", r"RTX 6000 Ada", None, None, None, _lambda(1146), _lambda(647)),
    Card("RTX A6000", r"RTX A6000", None, Figure(768, AIME), None, _lambda(916), _lambda(514)),
    Card("RTX 4090", r"RTX 4090", None, None, None, _lambda(1301), _lambda(721)),
    Card("RTX 3090", r"RTX 3090(?! Ti)", None, Figure(936, AIME), None, _lambda(905), _lambda(513)),
    Card("A10", r"\bA10\b", None, None, None, _lambda(638), _lambda(349)),
    Card("V100", r"V100", None, Figure(900, AIME), None, _lambda(833), _lambda(369)),
    Card("RTX 8000", r"Quadro RTX 8000", None, None, None, _lambda(651), _lambda(274)),
    Card("MI355X", r"MI355X", _spec(2300), None, _matmul(1565.0, "2.8.0")),
    Card("MI325X", r"MI325X", _spec(1300), None, _matmul(784.9, "2.6.0, 1000 W")),
    Card("MI300X", r"MI300X", _spec(1300), _spec(5300), _matmul(668.4, "2.5.1")),
]


def find_card(name: str) -> Card | None:
    """The card of a driver's name; None for a card that is not in the table, or only a part of one (MIG), or a laptop's.

    >>> find_card("NVIDIA H100 80GB HBM3").name
    'H100 SXM'
    """
    if re.search(r"\bMIG\b|Laptop|Max-Q|RTX 4090 D", name):
        return None  # fewer processors than the card whose name it bears
    return next((card for card in CARDS if re.search(card.pattern, name)), None)


SECONDS_OF_300_PASSES: dict[tuple[int, int, int, int], dict[str, dict[str, int]]] = {
    (16, 3, 224, 224): {
        "mobilenet_v2": {"RTX-3090": 6, "V100": 12, "A100": 8},
        "resnet50": {"RTX-3090": 7, "V100": 9, "A100": 8},
        "vgg16": {"RTX-3090": 9, "V100": 7, "A100": 5},
    },
    (64, 3, 224, 224): {
        "mobilenet_v2": {"RTX-3090": 16, "V100": 25, "A100": 24},
        "resnet50": {"RTX-3090": 19, "V100": 33, "A100": 24},
        "vgg16": {"RTX-3090": 29, "V100": 28, "A100": 22},
    },
}
"""1.7's table (its `BENCHMARK`): whole seconds of 300 forward passes in training mode, gradients recorded, `randn` on the CPU
and the copy inside the time, no warm-up, no synchronisation. It is history: no figure of today may be put beside it."""
