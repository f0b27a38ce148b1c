"""fp32, bf16 and fp16: no scale, the code is the value."""

from __future__ import annotations

from torch import Tensor

from reference import grid
from reference.format import Format, Quantized


def encode(fmt: Format, x: Tensor, global_scale: Tensor | None) -> Quantized:
    """One rounding to nearest even; saturating, unlike a torch cast, so that no inf is made from a finite value."""
    assert fmt.torch_dtype is not None
    return Quantized(fmt, fmt.element.round(x).to(fmt.torch_dtype))  # type: ignore[union-attr]


def _plain(element: grid.ElementType) -> Format:
    return Format(
        element.name, element, None, "even", True, element.source, encode, torch_dtype=grid.TORCH_DTYPES[element.name]
    )


FORMATS = (_plain(grid.FP32), _plain(grid.BF16), _plain(grid.FP16))
