"""The same simulated engines behind others' routers, and ours."""
