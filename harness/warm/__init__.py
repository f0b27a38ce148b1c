"""A library's JIT modules built ahead of time, on a machine that needs no GPU, for a GPU runner that has no time to compile."""
