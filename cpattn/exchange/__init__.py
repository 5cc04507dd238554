"""Layer 2: what travels between the ranks, and in which steps it is attended to."""
