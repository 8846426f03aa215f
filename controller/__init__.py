"""Kubernetes: who the peers are."""
