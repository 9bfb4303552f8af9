"""Experiments of papers, run anew on a small scale: verbs of ``fastclip experiment``."""
