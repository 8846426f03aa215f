"""Worker processes: one engine behind one contract."""
