"""Zero-shot classification and retrieval, on any number of ranks."""
