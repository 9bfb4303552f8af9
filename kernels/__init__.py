"""GPU kernels and their meaning. Knows torch (and, from the first CUDA call on, Triton) only.

The folder stands at the top of the repository and is imported as ``fastclip.kernels``.
"""

if __name__ != "fastclip.kernels":
    raise ImportError(
        f"import this package as fastclip.kernels, not as {__name__!r}: a second copy would "
        "register every operator twice (put the repository's root on sys.path, not this folder)"
    )
