"""From tar shards to batches: index, plan, decode, load."""
