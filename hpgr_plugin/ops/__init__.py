"""Arithmetic on tensors, a folder per operator; see `dispatch.py` for how a backend is chosen."""
