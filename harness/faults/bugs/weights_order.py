"""Faults of weight preparation: the order of w13's rows, an expert's stride, the note that weights are shuffled."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from harness.faults.fault import planted
from harness.inputs import Inputs
from harness.twins.aligned import AlignedMoe
from harness.twins.batched import BatchedMoe
from harness.twins.grouped import GroupedMoe
from harness.twins.weights import Stack
from reference.format import Quantized

INTERLEAVE = 32  # Megatron-LM --moe-mlp-glu-interleave-size
SHUFFLE_ROWS, SHUFFLE_COLUMNS, VECTOR = 16, 32, 8  # AITER shuffle_weight, layout (16, 16), 16 bytes of a 2-byte type

S = TypeVar("S", bound=Stack)


def reread(stack: Stack, kind: type[S]) -> S:
    """The same buffers under another way to address them."""
    return kind(**vars(stack))


class UpFirst(AlignedMoe):
    """Clean: a kernel that reads w13 as [up; gate], and a loader told so."""

    def halves(self, gate: Quantized, up: Quantized | None) -> tuple[Quantized, ...]:
        """Up on top."""
        return (gate,) if up is None else (up, gate)

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The lower half is the gate."""
        up, gate = pre.chunk(2, dim=-1)
        return gate, up


class LoaderNotToldUpFirst(UpFirst):
    """The NVFP4 scheme's load_up_proj_weight_first is not forwarded: [gate; up] is loaded, the kernel reads [up; gate]."""

    def halves(self, gate: Quantized, up: Quantized | None) -> tuple[Quantized, ...]:
        """The loader's default, for the scheme that wants the other order."""
        return AlignedMoe.halves(self, gate, up) if gate.format.name == "nvfp4" else super().halves(gate, up)


class TrainingHalves(GroupedMoe):
    """The training framework's [gate | up] goes unchanged to a kernel that reads fc1 as [up | gate]; BF16 only."""

    def halves(self, gate: Quantized, up: Quantized | None) -> tuple[Quantized, ...]:
        """The halves in the order that the reader takes for the other one."""
        return (up, gate) if up is not None and gate.format.scaling is None else super().halves(gate, up)


class UngatedActivationType(GroupedMoe):
    """F.silu is mapped to the ungated activation type whatever gated_linear_unit says: the shape check of fc1 fails."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """The check of the ungated type: fc1 has as many rows as fc2 has columns."""
        w13, w2 = super().pack(inputs)
        if w13.rows != w2.columns:
            raise RuntimeError(f"fc1_expert_weights has {w13.rows} rows, expected {w2.columns}")
        return w13, w2


class InterleavedReadOnly(AlignedMoe):
    """The activation pairs 32 gate with 32 up columns of FC1's output, but the weights were never interleaved by 32."""

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of 32 by turns; inter 32 is one block, where both orders agree."""
        blocks = pre.unflatten(-1, (-1, 2, INTERLEAVE))
        return blocks[..., 0, :].flatten(-2), blocks[..., 1, :].flatten(-2)


class InterleavedCheckpoint(BatchedMoe):
    """An MXFP4 checkpoint with gate and up rows by turns is accepted by a backend that reads them as two halves."""

    def row_order(self, rows: Tensor) -> Tensor:
        """As in the checkpoint: one conversion for all backends, and it converts nothing."""
        if not self.gated or self.case.recipe.weights != "mxfp4":
            return rows
        return torch.stack(rows.chunk(2), 1).flatten(0, 1)


class DenseExperts(Stack):
    """Gate and up as two views of w13, the experts of a view taken to lie side by side."""

    def code_offsets(self, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """Expert stride inter * hidden; that of a view of w13 is twice as large."""
        return ((expert * (self.rows // 2) + n) * self.columns)[:, None] + k


class ViewStrideIgnored(AlignedMoe):
    """Gate and up are views of packed w13; the first weight tile is expert * (inter / tile), as if experts were adjacent."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Unquantised gated weights take this path."""
        w13, w2 = super().pack(inputs)
        return (reread(w13, DenseExperts) if self.gated and w13.fmt.scaling is None else w13), w2


class Shuffled(Stack):
    """Codes in tiles of 16 rows x 32 columns, vectors of 8, if the tensor carries the note `is_shuffled`."""

    def code_offsets(self, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """Linear where the note is missing."""
        if not getattr(self.codes, "is_shuffled", False):
            return super().code_offsets(expert, n, k)
        strip = (n // SHUFFLE_ROWS)[:, None] * (self.columns // SHUFFLE_COLUMNS) + k // SHUFFLE_COLUMNS
        vector = strip * (SHUFFLE_COLUMNS // VECTOR) + k % SHUFFLE_COLUMNS // VECTOR
        inside = (vector * SHUFFLE_ROWS + (n % SHUFFLE_ROWS)[:, None]) * VECTOR + k % VECTOR
        return expert * self.rows * self.columns + inside


def shuffle(codes: Tensor) -> Tensor:
    """[experts, rows, columns] in tiles, with the note on the result."""
    split = codes.unflatten(2, (-1, SHUFFLE_COLUMNS // VECTOR, VECTOR)).unflatten(1, (-1, SHUFFLE_ROWS))
    tiles: Tensor = split.permute(0, 1, 3, 4, 2, 5).reshape(codes.shape)
    tiles.is_shuffled = True  # type: ignore[attr-defined]
    return tiles


class Preshuffled(AlignedMoe):
    """Clean: unquantised weights are shuffled at load and the tensor says so by an attribute."""

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """Both projections."""
        w13, w2 = super().pack(inputs)
        return self.prepared(w13), self.prepared(w2)

    def prepared(self, stack: Stack) -> Stack:
        """Shuffle, and hand the tensor to the layer."""
        if stack.fmt.scaling is not None:
            return stack
        stack.codes = self.registered(shuffle(stack.codes))
        return reread(stack, Shuffled)

    def registered(self, codes: Tensor) -> Tensor:
        """The tensor the layer keeps."""
        return codes


class NoteLostInParameter(Preshuffled):
    """Preshuffled weights say so by a tensor attribute, which a Parameter around them loses: dispatch reads them linear."""

    def registered(self, codes: Tensor) -> Tensor:
        """A Parameter is another object over the same storage."""
        return torch.nn.Parameter(codes, requires_grad=False)


VLLM, SGLANG, MEGATRON = (
    f"https://github.com/{repository}" for repository in ("vllm-project/vllm", "sgl-project/sglang", "NVIDIA/Megatron-LM")
)
FAULTS = (
    planted("B063", LoaderNotToldUpFirst, f"{SGLANG}/pull/32430", ("gate_up_swap",)),
    planted("B168", NoteLostInParameter, "https://github.com/ROCm/aiter/pull/4542", ("weight_order",)),
    planted("B170", TrainingHalves, f"{MEGATRON}/pull/6045", ("gate_up_swap",)),
    planted("B170", UngatedActivationType, f"{MEGATRON}/pull/6045", ("exception",)),
    planted("B194", ViewStrideIgnored, "https://github.com/linkedin/Liger-Kernel/pull/1377", ("wrong_expert",)),
    planted("B228", InterleavedReadOnly, f"{MEGATRON}/issues/7576", ("gate_up_interleave",)),
    planted("B229", InterleavedCheckpoint, f"{VLLM}/pull/52240", ("gate_up_interleave",)),
)
