"""Child processes: kernels run there, never in the process that holds the clock and the journal."""
