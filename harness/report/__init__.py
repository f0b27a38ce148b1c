"""Verdicts for people and for CI systems. The journal is the truth; everything here is derived from it."""
