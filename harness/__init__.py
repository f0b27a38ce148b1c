"""The machinery: judges MoE kernels against `reference`. Start reading at pipeline.py."""

__version__ = "0.1.0"
