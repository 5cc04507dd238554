"""Layer 1: which rank owns which tokens. Pure and rank-parametric: no process group, no GPU."""
