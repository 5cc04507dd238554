"""Where the model is known to be less sharp than a choice needs, what it says is corrected here, and nowhere else.

Each correction names what was measured. Sizes that do not fit, and what the model does not know at all, are the rules of
:mod:`cpattn.exchange.auto`.
"""

from __future__ import annotations

# The host's time is known within a factor of two, and estimates have the lesser end of it. Between H100 a call of flash_attn4 took the host
# 649 to 854 us in runs of four layers (scaling_4_gpus_all.csv), and between H200 461 to 580 in runs of up to 32 (peers_2_gpus.csv,
# all-gathers of up to 9k tokens and of 64 short requests), where 430 are estimated; one of triton took 320 to 390 and 128 to 140, where 150
# to 190 are.
HOST = 2.0
# An eager call takes longer than its graph also where the device takes longer than the host: between two H200 by a median of 0.09 of the
# host's time (peers_2_gpus.csv, 150 ways to make calls over 9 batches). So of two ways that take the device as long the one with fewer
# launches is taken.
EAGER = 0.08
# An eager ring is slower than its graph also where the device takes longer than the host: with triton by 3 to 7% over two H100 and by 9 to
# 15% over four, from 8 x (8k + 2k) on, and an all-gather by 1 to 3% (peers_2_gpus.csv, peers_4_gpus.csv).
EAGER_RING = 1.06


def corrected(strategy: str, graph: float, host: float, *, as_graph: bool) -> float:
    """Seconds by which ``auto`` compares ways to make a call, in a CUDA graph or eagerly: of what a strategy is estimated to take on the
    device, and on the host."""
    if as_graph:
        return graph
    return max(graph + EAGER * host, HOST * host) * (EAGER_RING if strategy.endswith("ring") else 1.0)
