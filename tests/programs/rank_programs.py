"""What the ranks of tests/processes run: functions of an importable module, so that a process can be sent their names."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from inputs.cases import AttentionCase
from peers.sglang_form import sglang_form
from peers.ulysses import ulysses
from peers.work import Heads, Work
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.transports.groups import Kind
from programs import split_heads


def attend(case: AttentionCase, plan: cpattn.Plan, strategy: StrategyChoice, backend: str) -> tuple[Tensor, Tensor]:
    return case.on_rank(plan, dist.get_rank(), None, strategy, backend)


def attend_many(cases: list[AttentionCase], strategy: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes through the same group and its buffers, with a check of agreement before each."""
    return [case.on_rank(case.plan(dist.get_world_size()), dist.get_rank(), None, strategy, "auto", check=True) for case in cases]


def attend_by_heads(case: AttentionCase, plan: cpattn.Plan, backend: str) -> list[Tensor]:
    """This rank's heads of all rows, on the CPU."""
    transport = cpattn.transport()
    meta = plan.metadata(transport.rank, case.device)
    return [x.cpu() for x in split_heads.call(case, meta, transport, backend=backend)]


def attend_by_device_mesh(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """As attend, but the group is one axis of a two-dimensional mesh; the other axis has size 1."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("tp", "cp"))
    meta = cpattn.plan(case.batch, dist.get_world_size()).metadata(mesh.get_local_rank("cp"))
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    out, lse = cpattn.cp_attention(q, k, v, meta, group=mesh["cp"], kv_cache=case.prefix, return_lse=True)
    return cpattn.unshard(out, meta, group=mesh["cp"]), cpattn.unshard(lse, meta, group=mesh["cp"])


def attend_in_subgroup(case: AttentionCase) -> tuple[Tensor, Tensor] | None:
    """The last two ranks form the group, in the order of ranks, so that group ranks and global ranks differ."""
    members = [dist.get_world_size() - 2, dist.get_world_size() - 1]
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    plan = cpattn.plan(case.batch, 2)
    meta = plan.metadata(dist.get_rank(group))
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    out, lse = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy="ring", return_lse=True)
    return cpattn.unshard(out, meta, group=group), cpattn.unshard(lse, meta, group=group)


PEERS = {"SGLang's form": sglang_form, "Ulysses": ulysses}
PEER_HEADS = Heads(12, 6, 16)


def attend_as_peer(name: str, batch: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """What a peer of the benchmarks gives on this rank, and which tokens these are."""
    work = Work.random(batch, dist.get_rank(), dist.get_world_size(), PEER_HEADS, torch.empty(0))
    call = PEERS[name](work)
    return call.run(), call.tokens


def prefill_and_decode(sharded: bool) -> tuple[Tensor, Tensor]:
    """Two requests in a pool: prefill in two chunks, then decode. Returns all outputs, and the oracle's for one long prefill."""
    size, rank = dist.get_world_size(), dist.get_rank()
    pool = cpattn.KVPool(8, 8, 1, kv_heads=2, head_dim=16, cp_size=size, cp_rank=rank, sharded=sharded)
    whole = AttentionCase([(0, 25), (0, 19)])
    first = {"a": 0, "b": 25}
    for name in first:
        pool.admit(name)
    out = torch.full_like(whole.q, torch.nan)
    for step in ({"a": 14}, {"a": 7, "b": 15}, *[{"b": 1, "a": 1}] * 4):
        rows = torch.cat([first[name] + pool.length(name) + torch.arange(extend) for name, extend in step.items()])
        meta = pool.plan(list(step.items()), pad_to=2).metadata(rank)
        q, k, v = (cpattn.shard(x[rows], meta) for x in (whole.q, whole.k, whole.v))
        out[rows] = cpattn.unshard(cpattn.cp_attention(q, k, v, meta, kv_cache=pool.layer(0, pool.page_table(list(step)))), meta)
    return out, whole.expected[0].to(out.dtype)


def _paged(c: AttentionCase, **changes: Any) -> cpattn.PagedKV:
    """The case's pages, changed."""
    fields = vars(c.pages(cpattn.plan(c.batch, dist.get_world_size()), dist.get_rank()).cache)
    return cpattn.PagedKV(**fields | {name: change(fields[name]) for name, change in changes.items()})


def _sharded_metadata(c: AttentionCase, holder: int) -> cpattn.CPMetadata:
    """Of a plan in which one rank holds the whole prefix of the first request."""
    shards = [[5 * (rank == holder) for rank in range(dist.get_world_size())], [0] * dist.get_world_size()]
    return cpattn.plan(c.batch, dist.get_world_size(), prefix_shards=shards).metadata(dist.get_rank())


# What each mistake changes of a correct call. The batch is [(5, 40), (0, 23)] with 4 query and 2 key/value heads of 16.
_MISTAKES: dict[str, Any] = {
    "rows": lambda c, t: t.update(q=torch.cat([t["q"], t["q"][:1]])),
    "k rows": lambda c, t: t.update(k=t["k"][1:]),
    "heads": lambda c, t: t.update(q=t["q"][:, :3]),
    "kv heads": lambda c, t: t.update(v=t["v"][:, :1]),
    "dtype": lambda c, t: t.update(k=t["k"].bfloat16()),
    "device": lambda c, t: t.update(q=t["q"].to("meta"), k=t["k"].to("meta"), v=t["v"].to("meta")),
    "head_dim": lambda c, t: t.update(k=t["k"][..., :8]),
    "batch axis": lambda c, t: t.update(q=t["q"][None]),
    "no prefix": lambda c, t: t.update(kv_cache=None),
    "prefix length": lambda c, t: t.update(kv_cache=cpattn.PackedKV(c.prefix_k[1:], c.prefix_v[1:])),
    "prefix of v": lambda c, t: t.update(kv_cache=cpattn.PackedKV(c.prefix_k, c.prefix_v[1:])),
    "prefix heads": lambda c, t: t.update(kv_cache=cpattn.PackedKV(c.prefix_k[:, :1], c.prefix_v[:, :1])),
    "strategy": lambda c, t: t.update(strategy="star"),
    "backend": lambda c, t: t.update(backend="flash_attn9"),
    "feature": lambda c, t: t.update(backend="cpu", softcap=5.0),
    "window": lambda c, t: t.update(window=0),
    "softcap": lambda c, t: t.update(softcap=-1.0),
    "scale": lambda c, t: t.update(scale=float("nan")),
    "sinks": lambda c, t: t.update(sinks=torch.zeros(3)),
    "overlap": lambda c, t: t.update(overlap=3),
    "gradient": lambda c, t: t.update(q=t["q"].clone().requires_grad_()),
    "table too narrow": lambda c, t: t.update(kv_cache=_paged(c, page_table=lambda x: x[:, :2])),
    "too few lines": lambda c, t: t.update(kv_cache=_paged(c, page_table=lambda x: x[:1])),
    "page that is not there": lambda c, t: t.update(kv_cache=_paged(c, page_table=lambda x: x.index_fill(1, torch.tensor([1]), 1000))),
    "page size": lambda c, t: t.update(kv_cache=_paged(c, v_pages=lambda x: x[:, :8])),
    "pass_q over whole pages": lambda c, t: t.update(kv_cache=_paged(c), strategy="pass_q"),
    "whole prefix of a sharded plan": lambda c, t: t.update(meta=_sharded_metadata(c, 0)),
    "v_dim": lambda c, t: t.update(v=None, v_dim=17),
    "group size": lambda c, t: t.update(meta=cpattn.plan(c.batch, dist.get_world_size() + 1).metadata(dist.get_rank())),
    "group rank": lambda c, t: t.update(
        meta=cpattn.plan(c.batch, dist.get_world_size()).metadata((dist.get_rank() + 1) % dist.get_world_size())
    ),
    "other batch": lambda c, t: t.update(meta=cpattn.plan([(5, 23), (0, 40)], dist.get_world_size()).metadata(dist.get_rank())),
    "foreign error": lambda c, t: t.update(sinks=_Broken()),
    "other scale": lambda c, t: t.update(scale=0.125),
    "other strategy": lambda c, t: t.update(strategy="ring"),
    "other shards": lambda c, t: t.update(meta=_sharded_metadata(c, 1), kv_cache=_paged(c), strategy="ring"),
    "other cache": lambda c, t: t.update(kv_cache=_paged(c)),
    "other heads": lambda c, t: t.update(k=t["k"][:, :1], v=t["v"][:, :1], kv_cache=cpattn.PackedKV(c.prefix_k[:, :1], c.prefix_v[:, :1])),
}


class _Broken:
    """An argument whose very type is a surprise."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no class")


def make_mistake(mistake: str, on_ranks: list[int], check: bool) -> tuple[str, str]:
    """Makes a call that is wrong on some ranks; returns the class and message of what it raised here.

    A correct call afterwards shows that nothing was left behind in the group, and nothing was sent by the wrong one.
    """
    case = AttentionCase([(5, 40), (0, 23)])
    meta = cpattn.plan(case.batch, dist.get_world_size()).metadata(dist.get_rank())
    call: dict[str, Any] = {"meta": meta, "kv_cache": case.prefix, "strategy": "all_gather"}
    call |= {name: cpattn.shard(x, meta) for name, x in (("q", case.q), ("k", case.k), ("v", case.v))}
    if dist.get_rank() in on_ranks:
        _MISTAKES[mistake](case, call)
    raised = ("nothing", "")
    try:
        cpattn.cp_attention(**call, check=check)
    except Exception as error:
        raised = (type(error).__name__, str(error))
    case.on_rank(meta.plan, dist.get_rank(), None, "ring", "cpu")
    return raised


def unshard_of_another_plan() -> str:
    """Rank 0 un-permutes by yesterday's batch."""
    batch = [(0, 30)] if dist.get_rank() == 0 else [(0, 10), (0, 20)]
    meta = cpattn.plan(batch, dist.get_world_size()).metadata(dist.get_rank())
    try:
        cpattn.unshard(torch.zeros(meta.rows, 2), meta, check=True)
    except cpattn.DisagreementError as error:
        return str(error)
    return "nothing"


def die_in_the_middle(strategy: str) -> tuple[str, float]:
    """Rank 1 dies after its first call; the others make a second. Returns what they see and after how many seconds."""
    case = AttentionCase([(0, 400)], heads=4)
    plan = cpattn.plan(case.batch, dist.get_world_size())
    case.on_rank(plan, dist.get_rank(), None, strategy, "cpu")
    if dist.get_rank() == 1:
        os._exit(7)
    start = time.monotonic()
    try:
        case.on_rank(plan, dist.get_rank(), None, strategy, "cpu")
    except Exception as error:
        return type(error).__name__, time.monotonic() - start
    return "nothing", time.monotonic() - start


def attend_on_gpu(case: AttentionCase, plan: cpattn.Plan, strategy: StrategyChoice, backend: str) -> tuple[Tensor, Tensor]:
    """On the GPU that is this rank's, where the case has come to lie; results go back through the CPU."""
    out, lse = case.on_rank(plan, dist.get_rank(), None, strategy, backend, check=True)
    return out.cpu(), lse.cpu()


def where_tensors_are(case: AttentionCase) -> set[torch.device]:
    """Of a case that was sent here, and of metadata that were made for it."""
    meta = cpattn.plan(case.batch, dist.get_world_size()).metadata(dist.get_rank(), case.device)
    return {x.device for x in (case.q, case.k, case.v, case.prefix_k, case.prefix_v, case.expected[0], meta.position_ids)}


def disagree_on_gpu() -> str:
    batch = [(0, 30)] if dist.get_rank() == 0 else [(0, 10), (0, 20)]
    meta = cpattn.plan(batch, dist.get_world_size()).metadata(dist.get_rank(), "cuda")
    try:
        cpattn.unshard(torch.zeros(meta.rows, 2, device="cuda"), meta, check=True)
    except cpattn.DisagreementError as error:
        return str(error)
    return "nothing"


def measured_links(device: str = "cpu", kind: Kind = "collectives") -> cpattn.Machine:
    return cpattn.measure_links(cpattn.transport(kind=kind), device=device)


def rank_of_this_process() -> int:
    return dist.get_rank()


def stop(rank: int) -> str:
    """Stops one rank's process, as a debugger or a batch system may."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    return "returned"
