"""GPUs, which tests take in turn, and what stands in for them, their memory and their libraries."""
