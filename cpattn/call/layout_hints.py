"""What a tensor of the wrong shape seems to be, and the view of it to pass: for the ends of error messages."""

from __future__ import annotations

from torch import Tensor


def hint_heads(name: str, x: Tensor, rows: int) -> str:
    """For what should be ``[rows, heads, head_dim]``; empty where nothing is recognized."""
    shape = tuple(x.shape)
    if len(shape) == 2:
        return f"; if the heads lie side by side: {name}.unflatten(1, (heads, head_dim))"
    if len(shape) == 3 and shape[0] != rows and shape[1] == rows:
        return f"; it seems to be [heads, rows, head_dim]: pass {name}.transpose(0, 1)"
    if len(shape) == 4 and shape[0] == 1:
        head_major = shape[1] != rows and shape[2] == rows
        return f"; pass {name}[0].transpose(0, 1) of [1, heads, rows, head_dim]" if head_major else f"; pass {name}[0]"
    if len(shape) == 4:
        return f"; rows of several requests lie one after another: {name}.flatten(0, 1) of [batch, tokens, heads, head_dim]"
    return ""


def hint_pages(x: Tensor) -> str:
    """For what should be pages ``[num_pages, page_size, heads, head_dim]``, by the number of axes alone."""
    if x.ndim == 5:
        axis = next((axis for axis in (0, 1) if x.shape[axis] == 2), None)
        if axis is not None:
            index = ("[0]", "[1]") if axis == 0 else ("[:, 0]", "[:, 1]")
            return f"; of K and V in one tensor pass the halves: k_pages=x{index[0]}, v_pages=x{index[1]}"
        return "; pass the pages of one layer"
    if x.ndim == 3:
        return (
            "; of slots [slots, heads, head_dim] pass x.unflatten(0, (-1, page_size)), "
            "of heads side by side x.unflatten(2, (heads, head_dim))"
        )
    return ""


def is_head_major(pages: Tensor, heads: int) -> bool:
    """Whether pages seem to be ``[num_pages, heads, page_size, head_dim]``. Not seen where a page has as many tokens as heads."""
    return pages.shape[1] == heads and pages.shape[2] != heads


def hint_head_major(name: str) -> str:
    return f"; it seems to be [num_pages, heads, page_size, head_dim]: pass the view {name}.transpose(1, 2)"
