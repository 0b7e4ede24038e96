"""Benchmarks: our path and the tools that people use today, on the same parts, in turn.

`python -m benchmarks list` names them, `python -m benchmarks run NAME` runs one. README.md says how
the figures are made and what they mean.
"""
