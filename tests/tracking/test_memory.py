"""Peak memory: what the allocator counts on an accelerator, what the process held on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from torch_frame.tracking.memory import peak_memory_bytes, peak_resident_bytes, reset_peak_memory


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_devices_that_do_not_count_give_none(kind: str) -> None:
    reset_peak_memory(torch.device(kind))
    assert peak_memory_bytes(torch.device(kind)) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot be asked")
def test_the_process_has_held_what_it_holds() -> None:
    before = peak_resident_bytes()
    assert before is not None
    held = torch.ones(50_000_000)
    after = peak_resident_bytes()
    assert after is not None
    assert after >= held.nbytes
    assert 10 * 2**20 < after < 2**40  # bytes, not pages or kilobytes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_what_torch_cuda_counts() -> None:
    device = torch.device("cuda:0")
    torch.empty(1 << 20, device=device)
    assert peak_memory_bytes(device) == torch.cuda.max_memory_allocated(device)
    reset_peak_memory(device)
    assert peak_memory_bytes(device) == torch.cuda.memory_allocated(device)
