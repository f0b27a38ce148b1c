"""FlashInfer's activations between the two GEMMs: act(x[..., :d]) * x[..., d:] in fp32, rounded once."""

from __future__ import annotations

from functools import partial

from harness.backends._ops import some_tokens
from harness.backends.base import Backend, Launch
from harness.case import Case
from harness.entry import needs, resolve
from harness.inputs import Inputs
from reference.rounding import Rounding

HOME = "flashinfer.activation"
FUNCTIONS = {"silu_and_mul": "swiglu", "gelu_and_mul": "geglu", "gelu_tanh_and_mul": "geglu_tanh"}
ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")  # gen_act_and_mul_module names none
DENSE = "the kernel takes rows to be dense and checks no stride (flashinfer/jit/activation.py, 0.7.2.post1)"


def prepare(name: str, case: Case, inputs: Inputs) -> Launch:
    """The library's function on x [tokens, 2 * inter], gate columns first."""
    function, x = resolve(f"{HOME}.{name}", inputs.device), inputs.x
    return Launch(lambda: function(x), {"x": x}, out=lambda buffer: function(x, out=buffer))


BACKENDS = tuple(
    Backend(
        name=f"flashinfer_{name}",
        op="activate",
        library="flashinfer-python",
        deterministic=True,
        recipes=("bf16", "fp16"),
        activations=(activation,),
        archs=ARCHS,
        rounding=lambda case: Rounding(out=case.recipe.out),
        probe=needs(f"{HOME}.{name}"),
        prepare=partial(prepare, name),
        limits=(some_tokens("jit/activation.py"),),
        exempt={"strided_inputs": DENSE, "out_strided": DENSE},
        entries=(f"{HOME}.{name}",),
        twinned=True,
        summary=f"{name}, rounded once",
    )
    for name, activation in FUNCTIONS.items()
)
