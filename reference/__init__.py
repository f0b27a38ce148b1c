"""The math: a pure-PyTorch reference MoE. Imports torch and the standard library, nothing else."""

from reference.formats.nvfp4 import dequantize_nvfp4_to_dtype

__all__ = ["dequantize_nvfp4_to_dtype"]
