"""Which versions of the libraries that make samples a run has loaded: with another one a sample may have other bits."""

from __future__ import annotations

import sys

LIBRARIES = frozenset(
    {
        *("numpy", "scipy", "pandas"),
        *(
            "PIL",
            "cv2",
            "skimage",
            "imageio",
            "tifffile",
            "torchvision",
            "albumentations",
            "albucore",
            "kornia",
            "imgaug",
        ),
        *("monai", "torchio", "pydicom", "nibabel", "SimpleITK"),
        *("torchaudio", "librosa", "soundfile", "soxr", "torchcodec", "av", "decord"),
        *("tokenizers", "sentencepiece", "transformers"),
    }
)
"""Modules by which datasets read, decode, resize, augment and tokenize."""


def loaded_versions() -> dict[str, str]:
    """Module -> version, of those of `LIBRARIES` that this process has imported; nothing is imported for it.

    A library that only loader workers import is not seen.

    >>> import numpy
    >>> loaded_versions()["numpy"] == numpy.__version__
    True
    """
    loaded = {name: getattr(sys.modules.get(name), "__dict__", {}) for name in LIBRARIES}
    versions = {name: values.get("__version__") for name, values in sorted(loaded.items())}
    return {name: version for name, version in versions.items() if isinstance(version, str)}
