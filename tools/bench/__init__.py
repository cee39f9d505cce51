"""Benchmarks as ratios inside one run: `python -m tools.bench NAME…`, or `list`.

Absolute times of a shared machine mean little: it drifts by half within seconds. So every benchmark
interleaves what it compares, counts CPU time beside wall time, and compares one side with itself as
well: what that comparison shows is noise, and so is any effect that is no larger (`protocol`).
"""
