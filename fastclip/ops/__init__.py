"""Whole passes of the losses as torch operators, and the choice of what computes them."""
