"""Transports: one-sided reads behind one small interface."""
