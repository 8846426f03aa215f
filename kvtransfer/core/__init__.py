"""The handoff's pure core: manifest, lease and session as values and transitions."""
