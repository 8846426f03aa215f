"""Engines behind the worker contract: vLLM, and a simulated one."""
