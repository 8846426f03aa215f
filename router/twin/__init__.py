"""The same router on virtual time."""
