"""What all twins share: the case's shapes, packed weights, step buffers, a tiled GEMM program, and the way to a Backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from harness.backends.base import Backend, Launch
from harness.case import Case, Limit
from harness.inputs import Inputs
from harness.twins.memory import load, store
from harness.twins.weights import Stack, build
from reference.format import WHOLE, Quantized
from reference.formats import get
from reference.rounding import Rounding

OAI_ALPHA, OAI_LIMIT = 1.702, 7.0  # gpt-oss-20b config.json and modeling code: swiglu_limit, alpha
GATED = ("swiglu", "swiglu_oai", "geglu")


def oai_gate(gate: Tensor) -> Tensor:
    """The gate half of gpt-oss's clamped SwiGLU."""
    clamped = gate.clamp(max=OAI_LIMIT)
    return clamped * torch.sigmoid(OAI_ALPHA * clamped)


def oai_up(up: Tensor) -> Tensor:
    """The linear half of gpt-oss's clamped SwiGLU."""
    return up.clamp(-OAI_LIMIT, OAI_LIMIT) + 1


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": torch.nn.functional.silu,
    "swiglu_oai": oai_gate,
    "geglu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
}


@dataclass
class Gemm:
    """One grouped GEMM: rows of `a` [rows, columns] times `weights`, into `out` [rows, weights.rows].

    divisor: row of a = slot // divisor (top_k where a is x); weighted: the epilogue multiplies by the routing weight.
    """

    a: Tensor
    weights: Stack
    out: Tensor
    divisor: int = 1
    weighted: bool = False


class Twin:
    """A fused-MoE library. A subclass says how tokens reach their experts; a fault overrides one step of it."""

    NAME: ClassVar[str] = ""
    RECIPES: ClassVar[tuple[str, ...]] = ("bf16", "nvfp4", "mxfp4")
    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("swiglu", "swiglu_oai", "silu")
    ROUTINGS: ClassVar[tuple[str, ...]] = ()
    DETERMINISTIC: ClassVar[bool] = True
    EXPERT_PARALLEL: ClassVar[bool] = True
    SWIZZLED: ClassVar[bool] = False
    BLOCK_M: ClassVar[int] = 16
    BLOCK_N: ClassVar[int] = 64
    BLOCK_K: ClassVar[int] = 64

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.shape = case, case.shape
        self.local = inputs.local
        self.gated = case.activation in GATED
        self.dtype = inputs.x.dtype
        self.step = self.step_buffers(inputs)
        self.w13, self.w2 = self.pack(inputs)

    def __call__(self) -> Tensor:
        """One call of the library: [tokens, hidden]."""
        out = self.empty(self.shape.tokens, self.shape.hidden)
        self.run(out)
        return out

    def run(self, out: Tensor) -> None:
        """The kernels of one call, into `out`."""
        raise NotImplementedError

    # -- preparation

    def step_buffers(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of a step, read at every call."""
        return {"x": inputs.x, "ids": inputs.topk_ids, "topk_weights": inputs.topk_weights}

    def pack(self, inputs: Inputs) -> tuple[Stack, Stack]:
        """(w13 [local experts, 2 * inter, hidden], w2 [local experts, hidden, inter])."""
        first = [self.halves(*inputs.gate_up(expert)) for expert in self.local]
        second = [(inputs.down(expert),) for expert in self.local]
        return build(first, self.row_order, self.SWIZZLED), build(second, lambda rows: rows, self.SWIZZLED)

    def halves(self, gate: Quantized, up: Quantized | None) -> tuple[Quantized, ...]:
        """The parts of w13, top to bottom."""
        return (gate,) if up is None else (gate, up)

    def row_order(self, rows: Tensor) -> Tensor:
        """The rows of w13 [2 * inter, ...] as they are stored."""
        return rows

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up) of the columns of GEMM 1's output: the inverse of `row_order`."""
        gate, up = pre.chunk(2, dim=-1)
        return gate, up

    # -- pieces of kernels

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh, uninitialised memory: an output or a workspace."""
        return torch.empty(shape, dtype=dtype or self.dtype)

    def activate(self, pre: Tensor) -> Tensor:
        """float32 [rows, 2 * inter] -> float32 [rows, inter]."""
        function = FUNCTIONS[self.case.activation]
        if not self.gated:
            return function(pre)
        gate, up = self.split(pre)
        return function(gate) * (oai_up(up) if self.case.activation == "swiglu_oai" else up)

    def grid_n(self, columns: int) -> int:
        """Tiles along a GEMM's columns."""
        return -(-columns // self.BLOCK_N)

    def grid_k(self, columns: int) -> int:
        """Steps of a GEMM's reduction."""
        return -(-columns // self.BLOCK_K)

    def multiply(self, gemm: Gemm, expert: int, rows: Tensor, mask: Tensor, tile: int) -> Tensor:
        """float32 [len(rows), BLOCK_N]: one tile's sum over K; rows of a at `rows` where `mask`, expert counted locally."""
        columns = tile * self.BLOCK_N + torch.arange(self.BLOCK_N)
        total = torch.zeros(len(rows), self.BLOCK_N)
        for index in range(self.grid_k(gemm.weights.columns)):
            k = index * self.BLOCK_K + torch.arange(self.BLOCK_K)
            total = total + self.load_a(gemm, rows, mask, k) @ self.load_b(gemm, expert, columns, k).T
        return total

    def load_a(self, gemm: Gemm, rows: Tensor, mask: Tensor, k: Tensor) -> Tensor:
        """float32 [len(rows), len(k)] of a, 0 outside."""
        inside = mask[:, None] & (k < gemm.weights.columns)
        return load(gemm.a, rows[:, None] * gemm.a.stride(0) + k, inside).float()

    def load_b(self, gemm: Gemm, expert: int, n: Tensor, k: Tensor) -> Tensor:
        """float32 [len(n), len(k)] of the expert's matrix, 0 outside."""
        inside = (n < gemm.weights.rows)[:, None] & (k < gemm.weights.columns)
        return gemm.weights.tile(expert, n, k, inside)

    def write(self, gemm: Gemm, total: Tensor, rows: Tensor, mask: Tensor, tile: int) -> None:
        """Store a tile to rows `rows` of the GEMM's output where `mask`."""
        columns = tile * self.BLOCK_N + torch.arange(self.BLOCK_N)
        inside = mask[:, None] & (columns < gemm.weights.rows)
        store(gemm.out, rows[:, None] * gemm.out.stride(0) + columns, total, inside)

    # -- the way into the harness

    @classmethod
    def rounding(cls, case: Case) -> Rounding:
        """Where it rounds: every tensor it writes is of x's dtype."""
        name = case.recipe.out
        return Rounding(gate_up=name, middle=name, row=name, out=name)

    def out(self, buffer: Tensor) -> object:
        """The call with the caller's out buffer."""
        self.run(buffer)
        return buffer

    def capture(self) -> Callable[[], Tensor]:
        """Records a call: the replay reads the step buffers again and returns the captured output."""
        out = self.empty(self.shape.tokens, self.shape.hidden)

        def replay() -> Tensor:
            self.run(out)
            return out

        return replay

    def tactics(self) -> dict[str, Callable[[], Tensor]]:
        """The same call under each tactic."""
        return {}

    def launch(self) -> Launch:
        """Bound to its buffers."""
        buffers = {**self.step, **self.w13.buffers("w13"), **self.w2.buffers("w2")}
        return Launch(self, buffers, out=self.out, capture=self.capture, tactics=self.tactics())

    @classmethod
    def backend(cls, name: str = "") -> Backend:
        """This twin as a subject, under `name` or its own."""
        return Backend(
            name=name or cls.NAME,
            library="torch",
            deterministic=cls.DETERMINISTIC,
            recipes=cls.RECIPES,
            activations=cls.ACTIVATIONS,
            routings=cls.ROUTINGS,
            archs=("cpu",),
            rounding=cls.rounding,
            limits=(Limit(("recipe", "hidden", "inter"), whole_blocks),),
            prepare=partial(_prepare, cls),
            summary=(cls.__doc__ or "").strip().splitlines()[0],
            expert_parallel=cls.EXPERT_PARALLEL,
        )


def _prepare(twin: type[Twin], case: Case, inputs: Inputs) -> Launch:
    return twin(case, inputs).launch()


def whole_blocks(case: Case) -> str | None:
    """Block scales and packed pairs cover whole blocks along both reduction axes."""
    scaling = get(case.recipe.weights).scaling
    group = 1 if scaling is None else scaling.group[1]
    for name, size in (("hidden", case.shape.hidden), ("inter", case.shape.inter)):
        if group != WHOLE and size % group:
            return f"{name} {size} is not a multiple of {group}, the block of {case.recipe.weights}"
    return None
