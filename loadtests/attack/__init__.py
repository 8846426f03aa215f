"""Attacks on a router and workers of this machine, and what they do to everybody else's streams."""
