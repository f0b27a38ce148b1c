"""Planted faults and what they measure: the kill matrix, the rules in use beside it, the audit of a user's own rule.

A fault (bugs/) reproduces the mechanism of a historical bug inside a twin or in our Triton kernels, not merely its symptom.
`--plugin FILE.py` adds yours: a file that defines FAULTS.
"""
