"""Layer 3: causal varlen attention over spans, by one of several backends, returning (out, LSE)."""
