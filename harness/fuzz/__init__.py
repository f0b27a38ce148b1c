"""Malformed files and ids for everything that moecheck reads: `make fuzz`, and a few in suites/selftest/test_fuzz.py.

mutate.py spoils what is valid, targets.py knows what is read and how, watch.py sees what a reader must never do.
"""
