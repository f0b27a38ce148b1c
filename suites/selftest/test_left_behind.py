"""A CUDA error that a call leaves for the next one is the call's own."""

from __future__ import annotations

import pytest
import torch

from harness.backends.base import CPU, Device
from harness.subject import synchronised

GPU = Device("cuda", "sm90")


def test_an_error_left_behind_is_this_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's scaled_fp8_quant of no tokens launches a grid of no blocks; torch's next launch was blamed for it."""

    def zeros(*shape: int, device: str) -> None:
        raise RuntimeError("CUDA error: invalid argument\nSearch for `cudaErrorInvalidValue'")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(RuntimeError, match=r"left an error behind for whoever comes next: CUDA error: invalid argument$"):
        synchronised(lambda: "fine", GPU)
    assert synchronised(lambda: "fine", CPU) == "fine"
