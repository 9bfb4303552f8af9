"""Pictures of a run: what it has learned, and how."""
