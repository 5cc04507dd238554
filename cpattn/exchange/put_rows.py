"""Scattering some of the rows of a tensor, in plain torch and without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def put_rows_(out: Tensor, index: tuple[Tensor, ...], values: Tensor, is_row: Tensor) -> None:
    """``out[index[0][i], index[1][i], ...] = values[i]`` where ``is_row[i]``; the others' index must lie inside of out, too."""
    if out.device.type == "cpu":
        out[tuple(axis[is_row] for axis in index)] = values[is_row]
        return
    if not values.numel():
        return
    # How many rows there are is known on the device alone: the others repeat the first one, or, where there is none,
    # write back what the first place of out holds.
    first = is_row.int().argmax()
    any_row = is_row[first]
    source = torch.where(is_row, torch.arange(len(is_row), device=out.device), first)
    to = tuple(torch.where(any_row, axis[source], 0) for axis in index)
    out[to] = torch.where(any_row, values[source], out[(0,) * len(index)])
