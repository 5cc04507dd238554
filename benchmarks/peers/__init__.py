"""What bench_peers.py times: calls of cpattn and of its peers over one batch, each in a form of its own."""
