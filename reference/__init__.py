"""The math: a pure-PyTorch reference MoE. Imports torch and the standard library, nothing else."""
