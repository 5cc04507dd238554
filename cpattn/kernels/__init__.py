"""Triton kernels and what they need on the host. Importing this package imports no triton; its kernel files do."""
