"""What a ``group`` argument stands for, and the transports that serve the calls over a group."""

from __future__ import annotations

import threading
from typing import Any, Literal, TypeAlias, TypeGuard, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpattn.errors import GroupError, OptionError, UnknownNameError, shown
from cpattn.graphs import leaves_graph
from cpattn.transports.group_state import state_of
from cpattn.transports.loopback import LoopbackGroup, LoopbackTransport
from cpattn.transports.peer_loopback import PeerLoopbackTransport
from cpattn.transports.peer_processes import PeerMemoryTransport
from cpattn.transports.process_group import ProcessGroupTransport
from cpattn.transports.transport import Transport, living_transports

# What a ``group`` argument takes.
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Transport | None"
# What can carry the bytes of a process group.
Kind: TypeAlias = Literal["auto", "collectives", "peer_memory"]
_KINDS = ", ".join(map(repr, get_args(Kind)))

# One for each thread that works without a group, so that its buffers serve all layers and batches.
_alone = threading.local()
# One transport a group and kind, so that its buffers serve all layers and batches.
_transports: WeakKeyDictionary[dist.ProcessGroup, dict[Kind, Transport]] = WeakKeyDictionary()


@leaves_graph
def transport(group: Group = None, kind: Kind = "auto") -> Transport:
    """The transport of a kind that serves all calls over a group: what carries their bytes, and the memory that these lie in.

    Every ``group=`` takes it, as it takes the group. It is for what a group alone does not have, such as :meth:`Transport.split`
    and :attr:`Transport.bytes_sent`. To ask for it sends nothing, and each rank may do so by itself.

    >>> import cpattn
    >>> rank_2 = cpattn.LoopbackGroup(6).transport(2)
    >>> cpattn.transport(rank_2) is rank_2
    True

    Args:
        group: a ProcessGroup, a DeviceMesh of one axis, or of two for all ranks of both, a Transport, or None for the default group.
        kind: what carries the bytes. ``"collectives"``: those of torch.distributed. ``"peer_memory"``: ranks of one host read
            what they need from the memory of each other's GPUs; whether they can they find out together, in the first call that
            sends. An end of a :class:`LoopbackGroup` takes it as well, where all ranks are on one GPU. ``"auto"``: the memory of
            peers for calls over CUDA tensors where ranks can share it, and collectives for all others.

    Raises:
        GroupError: there is no such group, this process is not in it, or it has been destroyed.
        UnknownNameError: there is no such kind.
        OptionError: the kind is no string, or group is a transport of another kind.
    """
    if not isinstance(kind, str):
        raise OptionError(f"kind={shown(kind)}; pass the name of a kind of transport: {_KINDS}")
    if kind not in get_args(Kind):
        raise UnknownNameError(f"kind={kind!r} is unknown; choose one of {_KINDS}")
    if isinstance(group, ProcessGroupTransport) and kind != "auto":
        group = group.group
    if isinstance(group, LoopbackTransport) and kind == "peer_memory":
        group = group.end_of_kind(PeerLoopbackTransport)
    if isinstance(group, Transport):
        if kind not in ("auto", group.kind):
            raise OptionError(
                f"kind={kind!r}, but group is a transport already, of kind {group.kind!r}; pass its process group, or leave kind out"
            )
    elif group is None and not (dist.is_available() and dist.is_initialized()):
        raise GroupError("there is no process group: call torch.distributed.init_process_group(), or pass group=")
    return as_transport(group, cp_size=0, kind=kind)


def as_transport(group: Group, cp_size: int, kind: Kind = "auto") -> Transport:
    """What a ``group`` argument stands for: a process group, one axis of a device mesh, a transport, or the default group.

    A plan for one rank needs none of them. Raises GroupError where no group can be had.
    """
    found = group if isinstance(group, Transport) else _transport_of(group, cp_size, kind)
    found.check_usable()
    return found


def _transport_of(group: dist.ProcessGroup | DeviceMesh | None, cp_size: int, kind: Kind) -> Transport:
    """The same, also where it cannot be used any more."""
    if group is None and cp_size == 1:
        return _alone_here()
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            launched = dist.is_available() and dist.is_torchelastic_launched()
            launch = "" if launched else f"launch with torchrun --nproc-per-node {cp_size} and "
            raise GroupError(
                f"the plan has {cp_size} ranks, but there is no process group: {launch}call torch.distributed.init_process_group(), "
                "or pass group="
            )
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        if _has_two_axes(group):
            return _over_mesh(group, kind)
        group = _process_group(group)
    kinds = _transports.get(group)
    if kinds is None:
        kinds = _transports.setdefault(group, {})
    transport = kinds.get(kind)
    return kinds.setdefault(kind, _make(group, kind, kinds)) if transport is None else transport


def _make(group: dist.ProcessGroup, kind: Kind, kinds: dict[Kind, Transport]) -> Transport:
    if kind == "peer_memory" or (kind == "auto" and torch.cuda.is_available()):
        return PeerMemoryTransport(group, insists=kind == "peer_memory")
    return kinds.setdefault("collectives", ProcessGroupTransport(group))


@leaves_graph
def check(group: Group = None) -> None:
    """Raises GroupError where a group cannot be used any more, as far as this process knows: for those who only replay CUDA graphs.

    Within a graph a rank may wait for one that has died. Over the memory of peers its device gives up after a time
    (``cpattn.transport(group).limit``, 30 s if nobody sets it), and results are NaN from then on. Eager calls and ``meta.copy_``
    look for that as well. It sends nothing and does not wait for the device: what goes wrong later is seen later.

    >>> import cpattn
    >>> cpattn.check(cpattn.LoopbackGroup(1).transport(0))

    Args:
        group: as for :func:`transport`.

    Raises:
        GroupError: the group was given up, or destroyed; the message says why.
    """
    found = transport(group)
    found.check_usable()
    for other in living_transports():
        if other.state is found.state:
            other.look_for_fault()
    if found.state.failure is not None:
        raise found.state.error()


@leaves_graph
def release(group: Group = None) -> None:
    """Frees the memory that messages over a group take up, or, without one, over all groups of this process that are idle.

    It is kept between calls, as large as the largest batch so far needed, and the next call makes it anew. What CUDA graphs
    have captured stays.

    Memory that ranks share is freed where a group is given. Then all its ranks have to do so, between the same calls, and each waits for
    its device and for the others, within the group's timeout. Without a group it stays, and each rank may free the rest by itself; so it
    may over a group that shares none. Of a group that was given up or destroyed each rank frees its own, and waits for its device alone.

    >>> import cpattn
    >>> cpattn.release()

    Args:
        group: a ProcessGroup (all transports over it), one axis of a DeviceMesh, or a Transport (its own and its parts').
            None is for everything but what calls of other threads are using.

    Raises:
        GroupError: group is none of these, a call is under way on it, a CUDA graph captures, or a rank did not come in time in an
            earlier call.
    """
    if group is None:
        transports = [transport for transport in living_transports() if not transport.state.is_in_use]
    elif isinstance(group, Transport) or _has_two_axes(group):
        found = group if isinstance(group, Transport) else _transport_of(group, 0, "auto")
        transports = [found, *found.parts()]
    else:
        state = state_of(_process_group(group))
        transports = [transport for transport in living_transports() if transport.state is state]
    if any(transport.state.is_in_use for transport in transports):
        raise GroupError("a call is under way on this group, whose memory it uses; release it after the call")
    for transport in transports:
        transport.release()
    if group is not None:
        # In an order that is every rank's: a group has one transport of a kind.
        for transport in sorted(transports, key=lambda transport: transport.kind):
            transport.release_together()


def _has_two_axes(group: Any) -> TypeGuard[DeviceMesh]:
    return isinstance(group, DeviceMesh) and group.ndim == 2


def _over_mesh(mesh: DeviceMesh, kind: Kind) -> Transport:
    """All ranks of a mesh of two axes, the last one innermost: the world, or a part of it, which needs no process group of its own."""
    _check_mesh(mesh)
    if dist.group.WORLD is None:
        raise GroupError(_NO_GROUP_OF_MESH)
    ranks, world = tuple(mesh.mesh.flatten().tolist()), _transport_of(dist.group.WORLD, 0, kind)
    return world if ranks == tuple(range(world.size)) else world._kept_part(ranks)


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim > 2:
        names = mesh.mesh_dim_names or "unnamed"
        raise GroupError(
            f"group is a device mesh of {mesh.ndim} axes ({names}); pass the context-parallel axes alone, one or two: mesh['cp']"
        )
    if mesh.get_coordinate() is None:
        raise GroupError(f"group is a device mesh that this process is not in; {_MEMBERS_ONLY}")


_NO_GROUP_OF_MESH = (
    "group is a device mesh without a process group, which was destroyed or never made; make a new mesh on every rank "
    "(torch.distributed.device_mesh.init_device_mesh), and pass that"
)
_MEMBERS_ONLY = "only its members make calls: pass the context-parallel group that this process belongs to, or skip the call here"


def _process_group(group: Any) -> dist.ProcessGroup:
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        _check_mesh(group)
        try:
            return group.get_group()
        except Exception as error:  # torch looks it up by name, and says in its own words that there is none
            raise GroupError(_NO_GROUP_OF_MESH) from error
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise GroupError(
            "group is GroupMember.NON_GROUP_MEMBER, which torch.distributed.new_group returns to processes that are not in the group; "
            f"{_MEMBERS_ONLY}"
        )
    fix = (
        "one rank's end of it, group.transport(rank)"
        if isinstance(group, LoopbackGroup)
        else ("a ProcessGroup this process belongs to, a DeviceMesh axis or a Transport")
    )
    raise GroupError(f"group is a {type(group).__name__}; pass {fix}")


def _alone_here() -> Transport:
    """This thread's transport without a group."""
    transport: Transport | None = getattr(_alone, "transport", None)
    if transport is None or transport.state.failure is not None:
        transport = _alone.transport = LoopbackGroup(1).transport(0)
    elif transport.state.is_in_use:
        # A caller's kernel may make a call of its own, which needs buffers of its own.
        brief = LoopbackGroup(1).transport(0)
        brief.lasts = False
        return brief
    return transport
