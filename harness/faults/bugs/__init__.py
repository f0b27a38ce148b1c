"""The planted faults, one real bug each: every file here defines FAULTS."""
