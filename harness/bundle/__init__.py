"""Repro bundles: one failure as a folder that its reader can run (repro.py) and that another moecheck can judge again.

write: collect.py (tensors, in the child) -> facts.py, script.py, write.py. read: read.py, which executes nothing -> compare.py.
"""
