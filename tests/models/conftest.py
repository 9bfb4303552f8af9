"""Imports transformers in the one way that works from the checkout's root."""

import peers  # noqa: F401
