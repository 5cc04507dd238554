"""Mistakes as they are written, each with the error and what its message must say. ``python tests/inputs/mistake_cases.py`` prints them
as a table, with the messages in full."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

import cpattn


class Mistake(NamedTuple):
    """An expression over :func:`names`, the error that it raises, and a part of its message that has the fix."""

    code: str
    error: type[cpattn.CPError]
    says: str


TENSORS = [
    # DTensors.
    Mistake("att(dt(q), k, v, meta)", cpattn.TensorMismatchError, "pass this rank's part as a plain tensor: q.to_local()"),
    Mistake("att(q, dt(k), v, meta)", cpattn.TensorMismatchError, "k is a DTensor"),
    Mistake("att(q, k, v, meta, sinks=dt(torch.zeros(4)))", cpattn.TensorMismatchError, "sinks.to_local()"),
    Mistake("att(q, k, v, cached, kv_cache=paged(k=dt(pages)))", cpattn.TensorMismatchError, "kv_cache.k_pages.to_local()"),
    Mistake("att(q, k, v, cached, kv_cache=paged(table=dt(table)))", cpattn.TensorMismatchError, "kv_cache.page_table.to_local()"),
    Mistake("att(q, k, v, cached, kv_cache=cpattn.PackedKV(dt(k[:4]), v[:4]))", cpattn.TensorMismatchError, "kv_cache.k.to_local()"),
    Mistake("cpattn.shard(dt(q), meta)", cpattn.TensorMismatchError, "x.to_local()"),
    Mistake("cpattn.unshard(dt(q), meta)", cpattn.TensorMismatchError, "x.to_local()"),
    Mistake("cpattn.gather_kv(dt(k), v, meta)", cpattn.TensorMismatchError, "k.to_local()"),
    Mistake("cpattn.attend(dt(q), paged(), cached)", cpattn.TensorMismatchError, "q.to_local()"),
    Mistake("cpattn.plan(dt(torch.tensor([[0, 6]])), 2)", cpattn.BatchError, "whose numbers cannot be read"),
    # Tensors without values of their own.
    Mistake("att(fake(q), fake(k), fake(v), meta)", cpattn.TensorMismatchError, "outside of FakeTensorMode"),
    Mistake("cpattn.shard(fake(q), meta)", cpattn.TensorMismatchError, "a shape but no data"),
    Mistake("att(q.to('meta'), k, v, meta)", cpattn.TensorMismatchError, "a meta tensor has a shape but no data: pass one with data"),
    Mistake("cpattn.shard(wrapped(q), meta)", cpattn.TensorMismatchError, "pass a plain torch.Tensor of the same values"),
    Mistake("att(masked(q), k, v, meta)", cpattn.TensorMismatchError, "q is a MaskedTensor, whose memory kernels cannot read"),
    Mistake("torch.vmap(lambda q: att(q, k, v, cpattn.build_metadata([(0, 6)], 1, 0)))(q[None])", cpattn.UnsupportedError, "outside of it"),
    # Other layouts of memory.
    Mistake("att(q.to_sparse(), k, v, meta)", cpattn.TensorMismatchError, "layout torch.sparse_coo"),
    Mistake("att(q.flatten(1).to_sparse_csr(), k, v, meta)", cpattn.TensorMismatchError, "pass q.to_dense()"),
    Mistake("cpattn.unshard(q.to_mkldnn(), meta)", cpattn.TensorMismatchError, "pass x.to_dense()"),
    Mistake("cpattn.write_kv(k.to_sparse(), v, paged(), slots)", cpattn.TensorMismatchError, "pass k.to_dense()"),
    Mistake("att(jagged(q, q[:3]), k, v, meta)", cpattn.TensorMismatchError, "one after another: q.values()"),
    Mistake("att(torch.nested.nested_tensor([q, q]), k, v, meta)", cpattn.TensorMismatchError, "torch.cat(q.unbind())"),
    Mistake("cpattn.shard(quantized(q), meta)", cpattn.TensorMismatchError, "pass x.dequantize()"),
    Mistake("att(quantized(q), k, v, meta)", cpattn.TensorMismatchError, "pass q.dequantize()"),
    # Dtypes.
    Mistake("att(q.to(fp8), k.to(fp8), v.to(fp8), meta)", cpattn.UnsupportedError, "fp8 is for pages alone"),
    Mistake("att(q, k, v, cached, kv_cache=paged(k=pages.to(fp8)))", cpattn.TensorMismatchError, "both must be of one dtype"),
    Mistake("att(q, k, v, cached, kv_cache=paged(k=pages.to(torch.uint8)))", cpattn.UnsupportedError, "k_pages.view(torch.float8_e4m3fn)"),
    Mistake(
        "att(q, k, v, cached, kv_cache=cpattn.PackedKV(k[:4].to(fp8), v[:4]))", cpattn.UnsupportedError, "pages alone may be in another"
    ),
    Mistake(
        "cpattn.attend(q, cpattn.PagedKV(pages.to(fp8), None, table), cached, v_dim=8)", cpattn.TensorMismatchError, "k_scale is None; pass"
    ),
    Mistake("att(q.int(), k.int(), v.int(), meta)", cpattn.TensorMismatchError, "all must be of one floating dtype"),
    Mistake("att(q.half(), k, v, meta)", cpattn.TensorMismatchError, "all must be of one floating dtype"),
    # Shapes.
    Mistake("att(q.flatten(1), k, v, meta)", cpattn.TensorMismatchError, "q.unflatten(1, (heads, head_dim))"),
    Mistake("att(q[None], k, v, meta)", cpattn.TensorMismatchError, "without a batch axis; pass q[0]"),
    Mistake("att(q.transpose(0, 1)[None], k, v, meta)", cpattn.TensorMismatchError, "pass q[0].transpose(0, 1)"),
    Mistake("att(q.unflatten(0, (2, 3)), k, v, meta)", cpattn.TensorMismatchError, "one after another: q.flatten(0, 1)"),
    Mistake("att(q.transpose(0, 1), k, v, meta)", cpattn.RowCountError, "[heads, rows, head_dim]: pass q.transpose(0, 1)"),
    Mistake("att(q.numpy(), k, v, meta)", cpattn.TensorMismatchError, "q is a ndarray; pass a tensor"),
]

PAGES = [
    Mistake("att(q, k, v, cached, kv_cache=paged(*head_major))", cpattn.TensorMismatchError, "kv_cache.k_pages.transpose(1, 2)"),
    Mistake("cpattn.attend(q[:, :2], paged(*head_major), cached)", cpattn.HeadCountError, "kv_cache.k_pages.transpose(1, 2)"),
    Mistake("att(q, k, v, cached, kv_cache=paged(torch.stack([pages, pages])))", cpattn.PageTableError, "k_pages=x[0], v_pages=x[1]"),
    Mistake("att(q, k, v, cached, kv_cache=paged(torch.stack([pages, pages], 1)))", cpattn.PageTableError, "k_pages=x[:, 0]"),
    Mistake("att(q, k, v, cached, kv_cache=paged(pages.flatten(0, 1)))", cpattn.PageTableError, "x.unflatten(0, (-1, page_size))"),
    Mistake("att(q, k, v, cached, kv_cache=paged(pages.flatten(2)))", cpattn.PageTableError, "x.unflatten(2, (heads, head_dim))"),
    Mistake("att(q, k, v, cached, kv_cache=(pages, pages))", cpattn.PrefixError, "kv_cache is a tuple; pass a PackedKV"),
    Mistake("att(q, k, v, cached, kv_cache=cpattn.PackedKV([1], v[:4]))", cpattn.PrefixError, "kv_cache.k is a list; pass a tensor"),
    Mistake(
        "att(q, k, v, two, kv_cache=paged(table=torch.tensor([[1, -1], [2, 3]])))", cpattn.PageTableError, "in the order of the batch?"
    ),
    Mistake("cpattn.slot_mapping(two, torch.tensor([[1, -1], [2, 3]]), 8)", cpattn.PageTableError, "in the order of the batch?"),
    Mistake("cpattn.slot_mapping(cached, paged(), 8)", cpattn.PageTableError, "kv_cache.page_table is a PagedKV; pass an int32 or int64"),
    Mistake("cpattn.slot_mapping(cached, table, 8.0)", cpattn.PageTableError, "page_size=8.0; pass the number of tokens of a page"),
    Mistake("cpattn.slot_mapping(plan, table, 8)", cpattn.CPError, "meta is a Plan; pass the CPMetadata"),
    Mistake("cpattn.write_kv(k, v, (pages, pages), slots)", cpattn.PrefixError, "kv_cache is a tuple; pass a PagedKV"),
    Mistake("cpattn.write_kv(k, v, paged(), slots.tolist())", cpattn.TensorMismatchError, "slots is a list; pass an int32 or int64"),
    Mistake("cpattn.write_kv(k.numpy(), v, paged(), slots)", cpattn.TensorMismatchError, "k is a ndarray; pass a tensor"),
    Mistake("pool.layer('0', pool.page_table(['a']))", cpattn.CPError, "pass an integer from 0 to 1"),
    Mistake("pool.layer(0, [[1]])", cpattn.PageTableError, "page_table is a list; pass what pool.page_table returned"),
    Mistake("pool.layer(0, dt(table))", cpattn.TensorMismatchError, "page_table.to_local()"),
]

SHARDING = [
    Mistake("cpattn.shard(torch.zeros(3, 6), meta)", cpattn.RowCountError, "cpattn.shard(x, meta, dim=1)"),
    Mistake("cpattn.shard(torch.zeros(1, 6, 8), meta)", cpattn.RowCountError, "cpattn.shard(x, meta, dim=1)"),
    Mistake("cpattn.shard(torch.zeros(8, 2), meta)", cpattn.RowCountError, "cut the padding off: x[:6]"),
    Mistake("cpattn.shard(torch.zeros(3, 64), meta, dim=1)", cpattn.RowCountError, "x.narrow(1, 0, 6)"),
    Mistake("cpattn.shard(torch.zeros(8, 2), meta)", cpattn.RowCountError, "plan with pad_to=n"),
    Mistake("cpattn.shard(q, meta, dim=3)", cpattn.OptionError, "pass the axis along which its tokens lie, an integer from -3 to 2"),
    Mistake("cpattn.shard(q, meta, dim='rows')", cpattn.OptionError, "dim='rows'"),
    Mistake("cpattn.shard(q, plan)", cpattn.CPError, "meta is a Plan; pass the CPMetadata of this rank"),
]

WORDS = [
    Mistake("att(q, k, v, meta, is_causal=True)", cpattn.OptionError, "is_causal: attention is always causal here; leave it out"),
    Mistake("att(q, k, v, meta, attn_mask=None)", cpattn.OptionError, "attn_mask: there are no masks"),
    Mistake("att(q, k, v, meta, custom_mask=None)", cpattn.OptionError, "custom_mask: there are no masks, and so no trees of drafts"),
    Mistake("att(q, k, v, meta, k_descale=None)", cpattn.OptionError, "k_descale: pages in fp8 bring theirs: kv_cache=cpattn.PagedKV("),
    Mistake("att(q, k, v, meta, softmax_scale=0.1)", cpattn.OptionError, "softmax_scale: pass it as scale="),
    Mistake("att(q, k, v, meta, dropout_p=0.0)", cpattn.OptionError, "without dropout; leave it out"),
    Mistake("att(q, k, v, meta, causal=True, dropout_p=0.1)", cpattn.OptionError, "; and none dropout_p: "),
    Mistake("att(q, k, v, meta, enable_gqa=True)", cpattn.OptionError, "fewer of them than of Q; leave it out"),
    Mistake("att(q, k, v, meta, window_size=(255, 0))", cpattn.OptionError, "pass window=left + 1"),
    Mistake("att(q, k, v, meta, window=(255, 0))", cpattn.OptionError, "left + 1, or None where left is -1"),
    Mistake("att(q, k, v, meta, cu_seqlens_q=slots)", cpattn.OptionError, "the metadata has the lengths of all requests"),
    Mistake("att(q, k, v, meta, block_table=table)", cpattn.OptionError, "kv_cache=cpattn.PagedKV(k_pages, v_pages, page_table)"),
    Mistake("cpattn.attend(q, paged(), cached, softmax_scale=0.1)", cpattn.OptionError, "attend has no argument softmax_scale"),
    Mistake("att(q, k, v, meta, windw=3)", cpattn.OptionError, "windw: did you mean window?"),
    Mistake("att(q, k, v, meta, zzz=3)", cpattn.OptionError, "zzz: it has group, v_dim, kv_cache"),
    Mistake("att(q, k, v, meta, scale=1e39)", cpattn.OptionError, "from 1e-30 to 1e+30 as kernels compute in fp32"),
    Mistake("att(q, k, v, meta, scale=1e-46)", cpattn.OptionError, "from 1e-30 to 1e+30"),
    Mistake("att(q, k, v, meta, softcap=1e39)", cpattn.OptionError, "softcap=1e+39; pass a positive number"),
    Mistake("att(q, k, v, meta, scale=1e20, softcap=1e-20)", cpattn.OptionError, "their ratio must be from 1e-30 to 1e+30"),
    Mistake("att(q, k, v, meta, scale=10**400)", cpattn.OptionError, "...; pass a positive number"),
    Mistake("att(q, k, v, meta, scale=10**5000)", cpattn.OptionError, "scale=a int of 16610 bits; pass"),
    Mistake("att(q, k, v, meta, scale=torch.tensor(0.1))", cpattn.OptionError, "scale=tensor(0.1000); pass a positive number"),
]

PLANS = [
    Mistake("cpattn.plan([(0, 6)], 10**9)", cpattn.PlanError, "cp_size=1000000000; the limit is 65536"),
    Mistake("cpattn.plan([(0, 6)], 10**5000)", cpattn.PlanError, "the limit is 65536"),
    Mistake("cpattn.required_rows([(0, 6)], 10**9)", cpattn.PlanError, "the limit is 65536"),
    Mistake("cpattn.plan([(0, 1)] * 4096, 65536)", cpattn.PlanError, "268435456 shares; the limit is 134217728"),
    Mistake("cpattn.required_rows([(0, 1)] * 4096, 65536)", cpattn.PlanError, "split the batch"),
    Mistake("cpattn.plan([(0, 10**5000)], 2)", cpattn.BatchError, "extend_len=a int of 16610 bits; the limit is 2147483647"),
    Mistake("cpattn.plan(torch.zeros(1, 2, device='meta'), 2)", cpattn.BatchError, "whose numbers cannot be read"),
    Mistake("cpattn.plan([(4, 1)], 2, prefix_shards=torch.zeros(1, 2, device='meta'))", cpattn.PlanError, "whose numbers cannot be read"),
    Mistake("cpattn.build_metadata([(0, 6)], 1, 0, device='gpu')", cpattn.CPError, "device='gpu' cannot be used on this machine"),
    Mistake("cpattn.build_metadata([(0, 6)], 1, 0, device=None)", cpattn.CPError, "pass a torch.device or its name"),
    Mistake("plan.metadata(0, 'cuda:99')", cpattn.CPError, "pass one of 'cpu'"),
    Mistake("plan.metadata(0, 'cpu', 8)", cpattn.PlanError, "bucket is a int; pass a cpattn.Bucket"),
    Mistake("plan.fits(8)", cpattn.PlanError, "bucket is a int; pass a cpattn.Bucket"),
    Mistake(
        "plan.fits(None)",
        cpattn.PlanError,
        "bucket is a NoneType; pass a cpattn.Bucket(max_requests, max_rows, max_chunks), or metadata that have one",
    ),
    Mistake("bucket.why_not([(0, 6)])", cpattn.PlanError, "pass a Plan, which cpattn.plan makes of a batch"),
    Mistake("bucket.check(meta)", cpattn.PlanError, "a bucket is asked about a CPMetadata; pass a Plan"),
    Mistake("cpattn.Bucket(1.0, 2, 3)", cpattn.PlanError, "max_requests=1.0; it must be an integer"),
    Mistake("in_bucket.copy_([(0, 6)])", cpattn.PlanError, "copy_ got a list; pass the Plan of the next batch"),
    Mistake("in_bucket.copy_(bucket)", cpattn.PlanError, "copy_ got a Bucket; pass the Plan"),
    Mistake("in_bucket.copy_(None)", cpattn.PlanError, "copy_ got a NoneType; pass the Plan"),
]

GROUPS = [
    Mistake("cpattn.unshard(q, meta, group=dist.GroupMember.NON_GROUP_MEMBER)", cpattn.GroupError, "only its members make calls"),
    Mistake("cpattn.release(dist.GroupMember.NON_GROUP_MEMBER)", cpattn.GroupError, "which torch.distributed.new_group returns to"),
    Mistake("cpattn.unshard(q, meta, group='cp')", cpattn.GroupError, "group is a str; pass a ProcessGroup"),
    Mistake("cpattn.unshard(q, meta, group=destroyed)", cpattn.GroupError, "this process group has been destroyed"),
    Mistake("att(q, k, v, meta, group=destroyed)", cpattn.GroupError, "make a new one on every rank"),
    Mistake("att(q, k, v, meta, group=its_communicator)", cpattn.GroupError, "this process group has been destroyed"),
    Mistake("cpattn.ProcessGroupCommunicator(destroyed)", cpattn.GroupError, "this process group has been destroyed"),
    Mistake("cpattn.LoopbackGroup(0)", cpattn.GroupError, "size=0; pass the number of ranks"),
    Mistake("cpattn.LoopbackGroup('2')", cpattn.GroupError, "size='2'; pass the number of ranks"),
    Mistake("cpattn.LoopbackGroup(2).communicator('1')", cpattn.GroupError, "it must be from 0 to 1"),
]

MISTAKES = [*TENSORS, *PAGES, *SHARDING, *WORDS, *PLANS, *GROUPS]


class _Wrapped(Tensor):
    """Values held elsewhere, as in the tensors of quantisation libraries."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


@contextmanager
def names() -> Iterator[dict[str, Any]]:
    """What the mistakes are made of. A process group of this process alone is there meanwhile."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.masked import masked_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q, k, v = (torch.randn(6, heads, 16) for heads in (4, 2, 2))
        pages, v_pages, table = torch.zeros(4, 8, 2, 16), torch.zeros(4, 8, 2, 16), torch.tensor([[0, 1]], dtype=torch.int32)
        plan, bucket = cpattn.plan([(0, 6)], 1), cpattn.Bucket(max_requests=4, max_rows=16, max_chunks=8)
        destroyed: Any = dist.new_group([0])
        its_communicator = cpattn.ProcessGroupCommunicator(destroyed)
        cpattn.unshard(q, plan.metadata(0), group=destroyed)
        dist.destroy_process_group(destroyed)
        pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=2, kv_heads=2, head_dim=16)
        pool.admit("a")

        def paged(k: Tensor = pages, v: Tensor = v_pages, table: Tensor = table) -> cpattn.PagedKV:
            return cpattn.PagedKV(k, v, table)

        yield {
            **globals(),
            "q": q,
            "k": k,
            "v": v,
            "pages": pages,
            "table": table,
            "slots": torch.arange(6),
            "fp8": torch.float8_e4m3fn,
            "plan": plan,
            "bucket": bucket,
            "pool": pool,
            "destroyed": destroyed,
            "its_communicator": its_communicator,
            "att": cpattn.cp_attention,
            "meta": plan.metadata(0),
            "cached": cpattn.build_metadata([(4, 6)], 1, 0),
            "two": cpattn.build_metadata([(8, 4), (0, 2)], 1, 0),
            "in_bucket": plan.metadata(0, bucket=bucket),
            "paged": paged,
            "head_major": [pages.transpose(1, 2).contiguous() for _ in range(2)],
            "dt": lambda x: distribute_tensor(x, mesh, [Replicate()]),
            "fake": FakeTensorMode().from_tensor,
            "wrapped": _Wrapped,
            "masked": lambda x: masked_tensor(x, x > 0),
            "jagged": lambda *parts: torch.nested.nested_tensor(list(parts), layout=torch.jagged),
            "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        }
    finally:
        dist.destroy_process_group()


def message(mistake: Mistake, given: dict[str, Any]) -> str:
    """What the mistake raises, which has to be of its class. Anything else leaves as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about prototypes such as masked tensors
        try:
            eval(mistake.code, given)
        except mistake.error as error:
            return str(error)
    raise AssertionError(f"{mistake.code} raised nothing")


def main() -> None:
    """Prints the table."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    print("| call | message |\n|---|---|")
    with names() as given:
        for mistake in dict.fromkeys(MISTAKES):
            said = message(mistake, given).replace("|", "\\|")
            print(f"| `{mistake.code}` | {mistake.error.__name__}: {said} |")


if __name__ == "__main__":
    main()
