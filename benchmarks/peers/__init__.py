"""Calls of cpattn and of its peers over one batch, each in a form of its own, and how bench_peers.py and bench_scaling.py time them."""
