"""An API server for tests: what a real one keeps and answers, without sockets and with them."""
