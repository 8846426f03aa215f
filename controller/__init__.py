"""Kubernetes: who the peers are, and how many there should be."""
