"""How much causal work a call does, and how fast."""

from __future__ import annotations

from cpattn.cli.traffic import Shape


def causal_flops(shape: Shape, pairs: int) -> float:
    """Of so many query-key pairs in each head: two products of a multiply and an add for each dimension.

    >>> causal_flops(Shape(1, 1, 8, 8, "float32", 4), pairs=10)
    320.0
    """
    return 2.0 * (shape.head_dim + shape.v_head_dim) * shape.heads * pairs


def in_flops(per_second: float) -> str:
    """
    >>> in_flops(3e12), in_flops(5e9)
    ('3.0 TFLOP/s', '5.0 GFLOP/s')
    """
    return f"{per_second / 1e12:,.1f} TFLOP/s" if per_second >= 1e12 else f"{per_second / 1e9:,.1f} GFLOP/s"
