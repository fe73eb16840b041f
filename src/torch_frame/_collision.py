"""Notices an install where PyG's `pytorch-frame`, which has the same import name, lies in this package's folder."""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).parent
# Files of pytorch-frame that this package has never had.
if any((_here / name).exists() for name in ("_stype.py", "typing.py", "gbdt", "nn")):
    raise ImportError(
        f"Two packages share the import name torch_frame in {_here}: torch-frame (this one) and PyG's pytorch-frame; their files "
        "have overwritten each other. Keep one in an environment: pip uninstall -y torch-frame pytorch-frame, "
        "then pip install --force-reinstall the one you want."
    )
