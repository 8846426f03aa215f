"""Tandem on one machine."""
