"""Whole passes of the losses as torch operators, and the choice of what computes them.

Each runs on its features' device, whatever the current one is: that is where Triton launches.
"""
