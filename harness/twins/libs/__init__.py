"""What a library's functions do, in torch, from the physical buffers: one module a family, found by folder.

A module defines ENTRIES: the dotted name of a library's function -> the twin, which has its signature, its return type, its
`out=` semantics and its undefined regions (rows beyond masked_m stay as they were).
"""
