"""The router's pure core: it receives `now` and returns values; it never does I/O."""
