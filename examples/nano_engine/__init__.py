"""What ``examples/nano_vllm.py`` needs beside cpattn: nano-vllm made to run here, a model for it, and requests."""

# Before nanovllm, which it imports with what that needs.
from nano_engine import stand_ins

__all__ = ["stand_ins"]
