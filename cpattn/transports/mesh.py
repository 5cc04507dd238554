"""All ranks of a DeviceMesh of several axes as one process group, the last axis innermost."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpattn.errors import GroupError

_groups: WeakKeyDictionary[DeviceMesh, dist.ProcessGroup] = WeakKeyDictionary()


def group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The process group of the ranks of a mesh; where there is none it is made, which is a collective call of those ranks.

    Raises GroupError where they do not ascend: a process group has its ranks in ascending order.
    """
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise GroupError(
            f"group is a device mesh of the ranks {mesh.mesh.tolist()}, which do not ascend along its axes as those of a process group do; "
            "pass a mesh whose last axis has ranks that follow each other, as init_device_mesh makes it"
        )
    world = dist.group.WORLD
    if world is not None and ranks == list(range(dist.get_world_size())):
        return world
    group = _groups.get(mesh)
    if group is None or not _is_known(group):
        # Those who are not in it do not call.
        group = _groups[mesh] = dist.new_group(ranks, use_local_synchronization=True)
    return group


def _is_known(group: dist.ProcessGroup) -> bool:
    """Whether torch still has it: a mesh equals another one of the same ranks, of a world that was destroyed."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False
