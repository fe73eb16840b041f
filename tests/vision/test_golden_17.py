"""torch_frame.vision returns what 1.7.5 returned for valid input; golden_17/make.py says how that was recorded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vision.golden_17.make import RESULTS, results
from tests.vision.pictures import without_opencv
from torch_frame import vision


@pytest.mark.parametrize("opencv", [True, False])
def test_valid_input_gives_what_1_7_5_gave(opencv, monkeypatch):
    tolerance = 1  # a level of 255, if torch resizes and warps
    if opencv:
        cv2 = pytest.importorskip("cv2")
        tolerance = 0 if cv2.__version__.startswith("5.0.") else 6  # OpenCV 4 warps by coordinates of 1/32 pixel
    else:
        without_opencv(monkeypatch)
    ours = results(vision)
    with np.load(RESULTS) as recorded:
        assert set(ours) == set(recorded.files)
        for name in recorded.files:
            expected = recorded[name]
            assert ours[name].dtype == expected.dtype, name
            assert ours[name].shape == expected.shape, name
            close = {"uint8": tolerance, "float16": 2e-3, "float32": 1e-5}.get(str(expected.dtype), 1e-7)
            difference = np.abs(ours[name].astype(np.float64) - expected.astype(np.float64))
            assert difference.max(initial=0) <= close, name
