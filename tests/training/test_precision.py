"""Autocast, and the context that stands where there is none."""

from __future__ import annotations

import pytest
import torch

from torch_frame.training.precision import NOTHING, Precision


def test_full_precision_has_a_context_that_changes_nothing_and_keeps_errors() -> None:
    context = Precision("fp32", torch.device("cpu")).autocast()
    assert context is NOTHING
    with context, context:  # one for all, so it may be entered inside itself
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(KeyError, match="lost"), context:
        raise KeyError("lost")
