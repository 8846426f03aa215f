"""Load, from outside: HTTP only."""
