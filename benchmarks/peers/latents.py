"""What a rank does for bench_mla.py: one layer of MLA over a batch, expanded and absorbed, on one GPU and on all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn import expansion
from cpattn.attention import expanded_keys
from cpattn.moves.wide_copy import copy_wide_
from cpattn.testing import single_device_bound

PAGE_SIZE = 64
# Rows that are compared at once, which bounds the memory of their fp32 copies.
_COMPARED_ROWS = 2048
# How long a card rests before it is timed: as long as it was last busy, within these bounds. At full load it lowers its clock.
_LEAST_REST, _MOST_REST = 0.002, 0.05


class Sizes(NamedTuple):
    """Of a layer: heads, the latent's part that is expanded, the rotated part, and what a head's key and value have of the first."""

    heads: int
    rank: int
    rope: int
    nope: int
    v_dim: int


class Variant(NamedTuple):
    """A way to make the layer.

    Attributes:
        form: ``"expanded"`` or ``"absorbed"``.
        ranks: that share it: all of them, or each makes it whole.
        backend, transport: as of cp_attention and cpattn.transport.
        beside: whether the next group of heads is expanded on a stream of its own; most_bytes: of a group.
    """

    form: str
    ranks: int
    backend: str = "auto"
    transport: str = "auto"
    beside: bool = True
    most_bytes: int = expansion.MOST_BYTES


class Prepared(NamedTuple):
    """Of one rank.

    Attributes:
        way: the strategy and the backend that were taken; or, with ``served`` False, why there is none.
        squares: of the difference to the reference, and of the reference.
        bound: what the relative error may be.
        seconds: of the call, roughly.
    """

    served: bool
    way: str
    squares: tuple[float, float] = (0.0, 1.0)
    bound: float = 0.0
    seconds: float = 0.0


@dataclass
class _Session:
    """A batch on this rank; tensors are of the whole batch.

    Attributes:
        reference: the layer's output; bound: of its kernel's own error.
        runs: by variant, each of which returns this rank's rows; replays: the same captured.
    """

    batch: list[tuple[int, int]]
    sizes: Sizes
    q: Tensor
    latent: Tensor
    weight: Tensor
    cache: cpattn.PagedKV | None
    reference: Tensor | None = None
    bound: float = 0.0
    runs: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    replays: dict[str, Callable[[], Any]] = field(default_factory=dict)
    stream: Any = None
    pool: Any = None
    rest: float = _LEAST_REST


_sessions: list[_Session] = []


def begin(batch: list[tuple[int, int]], sizes: Sizes, device_type: str) -> None:
    """Makes the tensors, the same on every rank; prefixes lie in pages."""
    finish()
    is_gpu = device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16 if is_gpu else torch.float32)

    tokens, prefixes = sum(extend for _, extend in batch), [prefix for prefix, _ in batch]
    latent_dim = sizes.rank + sizes.rope
    cache: cpattn.PagedKV | None = None
    if any(prefixes):
        counts = [-(-(prefix + extend) // PAGE_SIZE) for prefix, extend in batch]
        table = torch.arange(len(batch) * max(counts), device=device, dtype=torch.int32).view(len(batch), -1)
        cache = cpattn.PagedKV(normal(table.numel(), PAGE_SIZE, 1, latent_dim), None, table)
    q, latent = normal(tokens, sizes.heads, sizes.nope + sizes.rope), normal(tokens, 1, latent_dim)
    # So that expanded keys are of size 1.
    weight = normal(sizes.heads, sizes.nope + sizes.v_dim, sizes.rank) / sizes.rank**0.5
    _sessions.append(_Session(batch, sizes, q, latent, weight, cache))


def finish() -> None:
    """Forgets the batch."""
    _sessions.clear()
    gc.collect()
    cpattn.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepare(name: str, variant: Variant) -> Prepared:
    """Makes the variant's call, and compares what it gives with that of the first variant."""
    session = _sessions[-1]
    shares = variant.ranks > 1
    meta = cpattn.build_metadata(session.batch, variant.ranks, dist.get_rank() if shares else 0, device=session.q.device)
    q, latent = (cpattn.shard(x, meta) for x in (session.q, session.latent)) if shares else (session.q, session.latent)
    group: Any = cpattn.transport(kind=variant.transport) if shares else None  # type: ignore[arg-type]
    make = _expanded if variant.form == "expanded" else _absorbed
    try:
        with torch.no_grad():
            run, way = make(session, q, latent, meta, group, variant)
            # What has to be compiled is compiled now.
            run()
            in_step()
            start = time.perf_counter()
            out = run()
            _wait()
            seconds = time.perf_counter() - start
    except cpattn.UnsupportedError as reason:
        return Prepared(False, str(reason).partition("; ")[0])
    rows = out[: meta.num_tokens]
    if session.reference is None:
        # Two kernels' own errors, and in each form one rounding between the products.
        session.reference, session.bound = rows.clone(), 4 * single_device_bound(out.dtype, torch.zeros(1))
    index = meta.token_index[: meta.num_tokens].long()
    session.runs[name] = run
    return Prepared(True, way, _squares(rows, index, session.reference), session.bound, seconds)


def capture(name: str) -> tuple[float, float]:
    """Captures the call as a graph, and compares what a replay gives."""
    session = _sessions[-1]
    session.stream = session.stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # One memory for all graphs: nobody reads what they leave there.
    session.pool = session.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    in_step()
    with torch.no_grad(), torch.cuda.stream(session.stream):
        # NCCL's own threads may ask the device what they like.
        graph.capture_begin(pool=session.pool, capture_error_mode="thread_local")
        try:
            out = session.runs[name]()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(session.stream)
    session.replays[name] = graph.replay
    in_step()
    graph.replay()
    _wait()
    assert session.reference is not None
    is_whole = len(out) == len(session.reference)
    rank, size = (0, 1) if is_whole else (dist.get_rank(), dist.get_world_size())
    meta = cpattn.build_metadata(session.batch, size, rank, device=out.device)
    return _squares(out[: meta.num_tokens], meta.token_index[: meta.num_tokens].long(), session.reference)


def measure(name: str) -> float:
    """Seconds of a replay, or on a CPU of the call; ranks begin in step."""
    session = _sessions[-1]
    run = session.replays.get(name, session.runs[name])
    in_step()
    if session.q.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds = float(start.elapsed_time(end)) * 1e-3
    else:
        begin_ = time.perf_counter()
        with torch.no_grad():
            run()
        seconds = time.perf_counter() - begin_
    session.rest = min(max(seconds, _LEAST_REST), _MOST_REST)
    return seconds


def in_step() -> None:
    """Ranks begin together, on the host and on the device, after a rest."""
    _wait()
    dist.barrier()
    time.sleep(_sessions[-1].rest)


def _expanded(
    session: _Session, q: Tensor, latent: Tensor, meta: cpattn.CPMetadata, group: Any, variant: Variant
) -> tuple[Callable[[], Tensor], str]:
    sizes = session.sizes
    expand = cpattn.latent_expansion(session.weight, sizes.v_dim)
    named: dict[str, Any] = {"group": group, "v_dim": sizes.v_dim, "kv_cache": session.cache, "backend": variant.backend, "expand": expand}
    prepared = cpattn.prepare(q, latent, None, meta, **named)

    def run() -> Tensor:
        expanded_keys.EXPANDS_BESIDE, expansion.MOST_BYTES = variant.beside, variant.most_bytes
        out: Tensor = cpattn.cp_attention(q, latent, None, meta, **named)
        return out

    return run, f"{prepared.strategy.name}, {prepared.backend.name}"


def _absorbed(
    session: _Session, q: Tensor, latent: Tensor, meta: cpattn.CPMetadata, group: Any, variant: Variant
) -> tuple[Callable[[], Tensor], str]:
    """Queries absorb the weight of the keys, and results are expanded by that of the values: from the same tensors to the same result."""
    heads, rank, rope, nope, v_dim = session.sizes
    of_keys, of_values = session.weight[:, :nope], session.weight[:, nope:].transpose(1, 2)
    named: dict[str, Any] = {"group": group, "v_dim": rank, "kv_cache": session.cache, "scale": (nope + rope) ** -0.5}
    absorbed, result = q.new_empty(len(q), heads, rank + rope), q.new_empty(len(q), heads, v_dim)
    prepared = cpattn.prepare(absorbed, latent, None, meta, backend=variant.backend, **named)

    def run() -> Tensor:
        torch.bmm(q[..., :nope].transpose(0, 1), of_keys, out=absorbed[..., :rank].transpose(0, 1))
        copy_wide_(absorbed[..., rank:], q[..., nope:])
        out: Tensor = cpattn.cp_attention(absorbed, latent, None, meta, backend=variant.backend, **named)
        torch.bmm(out.transpose(0, 1), of_values, out=result.transpose(0, 1))
        return result

    return run, f"{prepared.strategy.name}, {prepared.backend.name}"


def _squares(rows: Tensor, index: Tensor, reference: Tensor) -> tuple[float, float]:
    difference = size = 0.0
    for begin_ in range(0, len(rows), _COMPARED_ROWS):
        part = slice(begin_, begin_ + _COMPARED_ROWS)
        want = reference[index[part]].float()
        difference += float((rows[part].float() - want).square().sum())
        size += float(want.square().sum())
    return difference, size


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
