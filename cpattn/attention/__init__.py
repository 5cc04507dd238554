"""Layer 3: causal varlen attention over ragged rows, by one of several backends, returning (out, LSE)."""
