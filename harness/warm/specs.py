"""What the installed FlashInfer would compile: its JIT specs, read in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UnknownName, WarmError
from harness.warm.units import Unit

_CHILD = Path(__file__).with_name("specs_child.py")
_JIT = "flashinfer.jit."
# Name of the module in FlashInfer's cache -> module, function that describes it, its arguments: 0.6.11.post2 and 0.7.2.post1.
GENERATORS: dict[str, tuple[str, ...]] = {
    "fused_moe_90": (_JIT + "fused_moe", "gen_cutlass_fused_moe_sm90_module"),
    "fused_moe_100": (_JIT + "fused_moe", "gen_cutlass_fused_moe_sm100_module"),
    "fused_moe_103": (_JIT + "fused_moe", "gen_cutlass_fused_moe_sm103_module"),
    "fused_moe_120": (_JIT + "fused_moe", "gen_cutlass_fused_moe_sm120_module"),
    "fp4_quantization_90": (_JIT + "fp4_quantization", "gen_fp4_quantization_sm90_module"),
    "fp8_blockscale_gemm_90": (_JIT + "gemm.fp8_blockscale", "gen_fp8_blockscale_gemm_sm90_module"),
    "gemm_sm90": (_JIT + "gemm.core", "gen_gemm_sm90_module"),
    "mxfp8_quantization_sm100": (_JIT + "fp8_quantization", "gen_mxfp8_quantization_sm100_module"),
    "silu_and_mul": (_JIT + "activation", "gen_act_and_mul_module", "silu"),
    "gelu_and_mul": (_JIT + "activation", "gen_act_and_mul_module", "gelu"),
    "gelu_tanh_and_mul": (_JIT + "activation", "gen_act_and_mul_module", "gelu_tanh"),
    "monomoe": (_JIT + "monomoe", "gen_monomoe_module"),
    "bgmv_moe": (_JIT + "bgmv_moe", "gen_bgmv_moe_module"),
    "dsv3_fused_routing": (_JIT + "dsv3_optimizations", "gen_dsv3_fused_routing_module"),
    "dsv3_router_gemm": (_JIT + "dsv3_optimizations", "gen_dsv3_router_gemm_module"),
    "hash_topk": (_JIT + "hash_topk", "gen_hash_topk_module"),
    "tinygemm2": (_JIT + "tinygemm2", "gen_tinygemm2_module"),
    "moe_utils": (_JIT + "moe_utils", "gen_moe_utils_module"),
}
# Its generator downloads headers from the vendor and tries for a minute without a network: not asked for a list.
DOWNLOADS = ("moe_utils",)


@dataclass(frozen=True, slots=True)
class Spec:
    """A JIT module as FlashInfer would build it, and the versions that its object files depend on."""

    module: str
    version: str
    toolchain: str
    units: tuple[Unit, ...]
    ldflags: tuple[str, ...]
    linker: str


def read(names: Iterable[str], arch: str, out: Path) -> dict[str, Spec | str]:
    """Each module's spec, or why FlashInfer gives none. `out` holds the sources that FlashInfer generates, under `ws`.

    Raises UnknownName, and WarmError where FlashInfer cannot be imported at all.
    """
    for name in names:
        if name not in GENERATORS:
            raise UnknownName("JIT module", name, GENERATORS)
    answer = _ask({"arch": arch, "workspace": str(out / "ws"), "generators": {name: GENERATORS[name] for name in names}})
    includes = tuple(word for folder in answer["includes"] for word in ("-isystem", folder))
    return {name: _spec(said, answer["version"], includes) for name, said in answer["modules"].items()}


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moecheck-") as folder:
        file = Path(folder) / "answer.json"
        command = [sys.executable, "-P", str(_CHILD), json.dumps({**question, "answer": str(file)})]
        child = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        if child.returncode or not file.exists():
            last = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
            raise WarmError(f"FlashInfer cannot be asked for its modules: {last[0]}\n  pip install flashinfer-python")
        return json.loads(file.read_text())  # type: ignore[no-any-return]


def _spec(said: dict[str, Any], version: str, includes: tuple[str, ...]) -> Spec | str:
    if "error" in said:
        return str(said["error"])
    units = tuple(Unit(Path(source), (*argv, *includes)) for source, argv in said["units"])
    toolchain = f"flashinfer {version}; {_compiler(said['nvcc'])}"
    return Spec(said["name"], version, toolchain, units, tuple(said["ldflags"]), said["linker"])


def _compiler(nvcc: str) -> str:
    """nvcc's build line, which differs between any two builds of it."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise WarmError(f"no nvcc: {error}\n  install the CUDA toolkit, set CUDA_HOME to its folder") from error
    return said.strip().splitlines()[-1].strip()
