"""``python -m fastclip``, ``torchrun -m fastclip`` and ``deepspeed --module fastclip``."""

from fastclip.cli import run

run()
