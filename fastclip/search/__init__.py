"""Images found by a text or by another image: embed shards once, then search their features."""
