"""Benchmarks of the kernels beside their peers; run as ``python -m benchmarks.bench_contrastive``.

A figure is a row that a program wrote, with the commit, the device and the versions it was measured
on; `benchmarks.report` makes the README's table of such rows.
"""
