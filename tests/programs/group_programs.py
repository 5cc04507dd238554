"""What the ranks of tests/processes/test_gloo.py run: calls over groups that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import cpattn


def _said(group: Any, cp_size: int) -> str:
    meta = cpattn.build_metadata([(0, 8)], cp_size, 0)
    q = torch.zeros(meta.rows, 2, 8)
    said = _refusal(lambda: cpattn.cp_attention(q, q, q, meta, group=group))
    assert _refusal(lambda: cpattn.unshard(q, meta, group=group)) == said
    return said


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except cpattn.GroupError as error:
        return str(error)
    return "right"


def outside_of_a_group() -> str:
    """Each rank but the first, of a group of the first alone."""
    group: Any = dist.new_group([0])
    if dist.get_rank():
        return _said(group, 1)
    meta = cpattn.build_metadata([(0, 8)], 1, 0)
    return str(tuple(cpattn.unshard(torch.zeros(8, 2), meta, group=group).shape))


def after_it_is_destroyed(used: bool) -> list[str]:
    """A group of all whose reference is kept, and then the one that is made in its place."""
    group: Any = dist.new_group()
    meta = cpattn.build_metadata([(0, 8)], dist.get_world_size(), dist.get_rank())
    x = torch.zeros(meta.rows, 2)
    if used:
        cpattn.unshard(x, meta, group=group)
    communicator = cpattn.ProcessGroupCommunicator(group)
    dist.destroy_process_group(group)
    said = [_said(group, dist.get_world_size()), _said(communicator, dist.get_world_size())]
    another: Any = dist.new_group()
    return [*said, str(tuple(cpattn.unshard(x, meta, group=another).shape))]
