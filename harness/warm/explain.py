"""What a compiler's or a linker's failure means for the user: a header and its wheel, a full disk, too little memory."""

from __future__ import annotations

import re

# Header -> PyPI wheel, looked up in the wheels' file lists (CUDA 13 names; CUDA 12 has the same with `-cu12`).
_WHEELS = {
    "cublas": "nvidia-cublas",
    "nvrtc": "nvidia-cuda-nvrtc",
    "curand": "nvidia-curand",
    "cuda_runtime": "nvidia-cuda-runtime",
    "crt/": "nvidia-cuda-crt",
    "cuda/": "nvidia-cuda-cccl",
    "cub/": "nvidia-cuda-cccl",
    "thrust/": "nvidia-cuda-cccl",
    "cudnn": "nvidia-cudnn-cu13",
    "cupti": "nvidia-cuda-cupti",
    "nvtx3": "nvidia-nvtx",
    "tvm/ffi": "apache-tvm-ffi",
}
_WORTH = re.compile(r"error|cannot find|undefined reference|No space left", re.IGNORECASE)
_MISSING = re.compile(r"fatal error: ([^\s:]+): No such file|cannot open source file \"([^\"]+)\"")


def explain(name: str, code: int, said: str) -> str:
    """One message: unit, exit status, the first error, and the remedy where it is known."""
    missing = _MISSING.search(said)
    first = next((line for line in said.splitlines() if _WORTH.search(line)), said.strip()[-300:])
    if "No space left on device" in said:
        remedy = "the disk is full: free some space, then run the same command again; what is built is kept"
    elif missing:
        remedy = _header(missing[1] or missing[2])
    elif code < 0 or "Killed" in said or "out of memory" in said:
        remedy = "the compiler was killed, most likely for memory (up to 9 GB a unit): fewer --jobs; what is built is kept"
    else:
        remedy = "what is built so far is kept"
    return f"{name}: the compiler ended with {code}: {first.strip()}\n  {remedy}"


def _header(header: str) -> str:
    wheel = next((wheel for start, wheel in _WHEELS.items() if header.startswith(start)), None)
    if wheel is None:
        return f"no wheel is known for {header}: add its folder to CPATH"
    return f"{header} is in the wheel {wheel}: pip install {wheel}, or add its include folder to CPATH"
