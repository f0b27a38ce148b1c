"""How fast the correct kernels are: one version, or two compared in one lease. No timing decides a verdict."""
