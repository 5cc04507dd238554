"""Random forward batches as SGLang's scheduler makes them, and a model of a few attention layers over them. Of SGLang's real classes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

from cpattn.testing import oracle_attention, relative_rmse, rmse_bound, single_device_bound
from engines.sglang_standin import RANK, Coordinator

MAX_LEN, SLOTS = 96, 480


class Layer(NamedTuple):
    """What a layer is made of, beside its heads."""

    window: int | None = None
    softcap: float = 0.0
    sinks: Tensor | None = None


class Case(NamedTuple):
    """A forward batch and the model that runs it.

    Attributes:
        batch: (prefix_len, extend_len) of each request; the engine's own padding is a request of (1, 0).
        slots: of each request, the slot of the pool of each token, new ones last.
        padding: input rows beyond the tokens.
        graph_rows: that each rank has beyond its own, where SGLang replays a graph of a larger batch.
        pool: of each layer K and V ``[slots, Hkv, D]``, before the forward.
        x: ``[tokens, Hq + 2 * Hkv, D]``: what each layer takes its q, k, v from.
        kv_dtype: of SGLang's pool.
    """

    batch: list[tuple[int, int]]
    slots: list[Tensor]
    page_size: int
    padding: int
    graph_rows: int
    layers: list[Layer]
    heads: tuple[int, int]
    pool: list[tuple[Tensor, Tensor]]
    x: Tensor
    num_slots: int = SLOTS
    kv_dtype: torch.dtype = torch.float32

    @property
    def head_dim(self) -> int:
        return self.x.shape[-1]

    @property
    def device(self) -> str:
        return self.x.device.type

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """On a device, in a dtype."""
        layers = [layer if layer.sinks is None else layer._replace(sinks=layer.sinks.to(device)) for layer in self.layers]
        pool = [(k.to(device, dtype), v.to(device, dtype)) for k, v in self.pool]
        return self._replace(layers=layers, pool=pool, x=self.x.to(device, dtype), kv_dtype=dtype)

    @property
    def new_slots(self) -> Tensor:
        return torch.cat([slots[prefix : prefix + extend] for slots, (prefix, extend) in zip(self.slots, self.batch, strict=True)])

    @property
    def positions(self) -> Tensor:
        return torch.cat([torch.arange(prefix, prefix + extend) for prefix, extend in self.batch])

    def qkv(self, x: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows, which are rotated by their positions as a model does: a wrong position shows."""
        q_heads, kv_heads = self.heads
        q, k, v = x.tensor_split([q_heads, q_heads + kv_heads], dim=1)
        turn = torch.cos(positions.to(x.device) * (layer + 1) / 9)[:, None, None].to(x.dtype)
        return q * turn, k * turn, v + layer

    def expected(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By the oracle: what a layer returns, its LSE, and K and V of the pool after it."""
        q, k, v = self.qkv(self.x, self.positions, layer)
        k_pool, v_pool = (x.clone() for x in self.pool[layer])
        prefixes = torch.cat([slots[:prefix] for slots, (prefix, _) in zip(self.slots, self.batch, strict=True)])
        options = self.layers[layer]
        out, lse = oracle_attention(
            q,
            k,
            v,
            self.batch,
            prefix_k=k_pool[prefixes],
            prefix_v=v_pool[prefixes],
            window=options.window,
            softcap=options.softcap or None,
            sinks=options.sinks,
        )
        k_pool[self.new_slots], v_pool[self.new_slots] = k, v
        return out, lse, k_pool, v_pool


def random_case(seed: int, cp_size: int, head_dim: int = 8) -> Case:
    """Of any kind that SGLang splits, and of those that it does not: one request of one token among long ones, decodes in a mixed step,
    a whole batch of short ones, and requests that only pad the batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    most = 2 * cp_size
    kind = rng.choice(["long", "long", "one short", "mixed", "short", "padded"])
    batch = []
    for _ in range(rng.randint(1, 4)):
        extend = rng.randint(1, 6) if kind == "short" else rng.randint(most, MAX_LEN // 2)
        batch.append((rng.choice([0, 0, rng.randint(1, MAX_LEN - extend)]), extend))
    if kind == "one short":
        batch.insert(rng.randint(0, len(batch)), (rng.choice([0, 5]), 1))
    if kind == "mixed":
        batch += [(rng.randint(1, MAX_LEN - 1), 1) for _ in range(rng.randint(1, 3))]
    if kind == "padded":
        batch.append((1, 0))
    while sum(extend for _, extend in batch) < most:
        batch.append((0, rng.randint(1, most)))
    page_size = rng.choice([1, 4, 16])
    # The pool's first page is nobody's: padding is written there.
    pages = torch.randperm(SLOTS // page_size - 1) + 1
    slots, taken = [], 0
    for prefix, extend in batch:
        need = -(-(prefix + extend) // page_size)
        slots.append((pages[taken : taken + need, None] * page_size + torch.arange(page_size)).flatten()[: prefix + extend])
        taken += need
    kv_heads = rng.choice([1, 2])
    q_heads = kv_heads * rng.choice([1, 3])
    layers = [
        Layer(),
        Layer(rng.choice([None, 1, 7, 30]), rng.choice([0.0, 5.0]), rng.choice([None, torch.randn(q_heads)])),
    ]
    pool = [tuple(torch.randn(2, SLOTS, kv_heads, head_dim).unbind()) for _ in layers]
    tokens = sum(extend for _, extend in batch)
    x = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim)
    return Case(batch, slots, page_size, rng.choice([0, 0, 3, 8]), rng.choice([0, 0, 6]), layers, (q_heads, kv_heads), pool, x)  # type: ignore[arg-type]


class Ran(NamedTuple):
    """What one rank has after a forward.

    Attributes:
        rows: of its hidden states.
        own_gathers, kernel_calls: how often layers used SGLang's own collectives and its own kernel.
    """

    outs: list[Tensor]
    hidden: Tensor
    positions: Tensor
    pool: list[tuple[Tensor, Tensor]]
    was_split: bool
    rows: int
    own_gathers: int
    kernel_calls: int


def run_rank(case: Case, transport: Any, pool_class: str = "MHATokenToKVPool") -> Ran:
    """A forward as SGLang's eager runner makes it, on one rank, by whichever strategy it has been given.

    Args:
        pool_class: the name of the pool's class; of another than SGLang's plain one cpattn's kernels know nothing.
    """
    from sglang.srt.layers.cp import base, utils

    RANK.parallel = parallel_of(transport)
    coordinator = RANK.parallel.attn_cp_group
    pool, full_to_swa = pool_of(case, pool_class)
    RANK.backend = backend_of(case, pool, full_to_swa)
    RANK.kernel_calls = 0
    forward_batch = forward_batch_of(case)
    was_split = utils.is_cp_active(forward_batch)
    x = torch.cat([case.x, case.x.new_full((case.padding, *case.x.shape[1:]), torch.nan)])
    positions = forward_batch.positions
    if not was_split:
        forward_batch.out_cache_loc = case.new_slots.to(case.device)
        RANK.backend.init_forward_metadata(forward_batch)
        outs = _layers(case, x[: len(case.x)], positions[: len(case.x)], forward_batch)
        hidden, positions = torch.stack(outs), positions[: len(case.x)]
        return Ran(outs, hidden, positions, contents_of(case, pool), was_split, len(x), coordinator.gathers, RANK.kernel_calls)
    utils.prepare_cp_forward(forward_batch)
    step = forward_batch.attn_cp_metadata
    assert step.per_rank_actual_token[0] % (2 * transport.size) == 0
    step.per_rank_actual_token = [rows + case.graph_rows for rows in step.per_rank_actual_token]
    RANK.backend.init_forward_metadata(forward_batch)
    local_x, local_positions = utils.cp_split_before_forward(x, positions, forward_batch)
    assert len(local_x) == step.per_rank_actual_token[0]
    turned = utils.cp_shard_position_ids(torch.stack([positions] * 3), forward_batch)
    assert torch.equal(turned, torch.stack([local_positions] * 3))
    here = base.get_cp_strategy().local_q_indices(len(x), forward_batch)
    assert torch.equal(local_x[: len(here)], x[here])
    assert not local_x[len(here) :].any()
    own = coordinator.gathers
    local = _layers(case, local_x, local_positions, forward_batch)
    own = coordinator.gathers - own
    outs = [utils.cp_gather_after_forward(out, forward_batch) for out in local]
    hidden, _ = utils.cp_gather_after_forward((torch.stack(local, dim=1), local[0]), forward_batch)
    everywhere = utils.cp_materialize_global_token_order(local_positions, forward_batch)
    return Ran(outs, hidden.transpose(0, 1), everywhere, contents_of(case, pool), was_split, len(local_x), own, RANK.kernel_calls)


def parallel_of(transport: Any) -> Any:
    """What SGLang knows of a rank's groups."""
    return SimpleNamespace(
        attn_cp_rank=transport.rank,
        attn_cp_size=transport.size,
        attn_cp_group=Coordinator(transport),
        attn_tp_size=1,
        attn_dp_enabled=False,
        enable_prefill_cp=True,
        enable_cp_tp_group_sharing=False,
    )


def pool_of(case: Case, kind: str) -> tuple[Any, Tensor]:
    """SGLang's pool of that class, filled; and where SWAKVPool has each slot for its layers with a window."""
    from sglang.srt.mem_cache import memory_pool, swa_memory_pool

    _, kv_heads = case.heads
    size = case.num_slots - case.page_size
    if kind != "SWAKVPool":
        pool = type(kind, (memory_pool.MHATokenToKVPool,), {})(
            size, case.page_size, case.kv_dtype, kv_heads, case.head_dim, len(case.layers), case.device, False
        )
        layers = list(zip(pool.k_buffer, pool.v_buffer, strict=True))
        full_to_swa = torch.arange(case.num_slots, device=case.device)
    else:
        has_own = [number for number, layer in enumerate(case.layers) if layer.window is not None]
        others = [number for number in range(len(case.layers)) if number not in has_own]
        pool = swa_memory_pool.SWAKVPool(size, size, case.page_size, case.kv_dtype, kv_heads, case.head_dim, has_own, others, case.device)
        full_to_swa = _swa_slots(case).to(case.device)
        pool.register_mapping(full_to_swa)
        layers = [pool.get_kv_buffer(number) for number in range(len(case.layers))]
    for number, (buffers, given) in enumerate(zip(layers, case.pool, strict=True)):
        for buffer, x in zip(buffers, given, strict=True):
            if kind == "SWAKVPool" and number in has_own:
                # What is not there any more must not be looked at.
                buffer[full_to_swa] = x
                buffer[: case.page_size] = 1e9
            else:
                buffer.copy_(x.to(case.kv_dtype).view(buffer.dtype))
    return pool, full_to_swa


def _swa_slots(case: Case) -> Tensor:
    """Each page somewhere else, and in the first page what windows reach no more."""
    pages = case.num_slots // case.page_size
    moved = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(pages - 1, generator=torch.Generator().manual_seed(0)) + 1])
    reach = max([layer.window for layer in case.layers if layer.window is not None], default=0)
    for slots, (prefix, _) in zip(case.slots, case.batch, strict=True):
        gone = max(0, prefix - reach) // case.page_size
        moved[slots[: gone * case.page_size : case.page_size] // case.page_size] = 0
    slot = torch.arange(case.num_slots)
    return moved[slot // case.page_size] * case.page_size + slot % case.page_size


def contents_of(case: Case, pool: Any) -> list[tuple[Tensor, Tensor]]:
    """K and V of each layer by the slots of the batch; as they were, where the pool has given them up."""
    if type(pool).__name__ != "SWAKVPool":
        return list(zip(pool.k_buffer, pool.v_buffer, strict=True))
    contents = []
    for number, layer in enumerate(case.layers):
        buffers = pool.get_kv_buffer(number)
        if layer.window is not None:
            is_there = pool.full_to_swa_index_mapping >= case.page_size
            places = pool.full_to_swa_index_mapping[is_there]
            buffers = [given.index_put((is_there,), buffer[places]) for given, buffer in zip(case.pool[number], buffers, strict=True)]
        contents.append(tuple(buffers))
    return contents


def _layers(case: Case, x: Tensor, positions: Tensor, forward_batch: Any) -> list[Tensor]:
    from sglang.srt.layers.radix_attention import RadixAttention

    q_heads, kv_heads = case.heads
    outs = []
    for number, options in enumerate(case.layers):
        window = -1 if options.window is None else options.window - 1
        layer = RadixAttention(q_heads, case.head_dim, case.head_dim**-0.5, kv_heads, number, logit_cap=options.softcap)
        layer.sliding_window_size = window
        more = {} if options.sinks is None else {"sinks": options.sinks}
        out = layer(*(y.flatten(1) for y in case.qkv(x, positions, number)), forward_batch, **more)
        outs.append(out.view(len(x), q_heads, case.head_dim))
    return outs


def backend_of(case: Case, pool: Any, full_to_swa: Tensor | None = None) -> Any:
    """SGLang's FlashAttention backend over a pool, and a table of the slots of each request."""
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    longest = max(map(len, case.slots))
    req_to_token = torch.zeros(len(case.batch) + 1, longest, dtype=torch.int32)
    for line, slots in enumerate(case.slots):
        req_to_token[line + 1, : len(slots)] = slots
    q_heads, kv_heads = case.heads
    runner = SimpleNamespace(
        sliding_window_size=None,
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            context_len=longest,
            attention_arch="MHA",
            is_local_attention_model=False,
            head_dim=case.head_dim,
            hf_text_config=SimpleNamespace(num_attention_heads=q_heads),
            get_num_kv_heads=lambda tp: kv_heads,
        ),
        device=case.device,
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token.to(case.device), size=len(case.batch)),
        token_to_kv_pool=pool,
        kv_cache_dtype=pool.dtype,
        kv_cache_dtype_str="auto" if case.kv_dtype == case.x.dtype else str(case.kv_dtype),
        page_size=case.page_size,
        kv_index_translator=SimpleNamespace(
            is_translating=False,
            write_ids=lambda forward_batch, kind: None if full_to_swa is None else full_to_swa[forward_batch.out_cache_loc],
        ),
        is_draft_worker=False,
        server_args=MagicMock(),
    )
    return FlashAttentionBackend(runner)


def forward_batch_of(case: Case) -> Any:
    """As SGLang's scheduler hands it to a model's runner."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    prefixes, extends = [p for p, _ in case.batch], [n for _, n in case.batch]
    totals = torch.tensor([p + n for p, n in case.batch])
    padding = torch.zeros(case.padding, dtype=torch.int64)
    is_mixed = any(n == 1 and p for p, n in case.batch)
    return ForwardBatch(
        forward_mode=ForwardMode.MIXED if is_mixed else ForwardMode.EXTEND,
        batch_size=len(case.batch),
        input_ids=torch.cat([torch.arange(sum(extends)), padding]).to(case.device),
        # The pool of requests keeps its first line for padding, too.
        req_pool_indices=torch.arange(1, len(case.batch) + 1).to(case.device),
        seq_lens=totals.to(case.device),
        out_cache_loc=torch.cat([case.new_slots, padding]).to(case.device),
        seq_lens_sum=int(totals.sum()),
        seq_lens_cpu=totals,
        positions=torch.cat([case.positions, padding]).to(case.device),
        extend_num_tokens=sum(extends),
        extend_seq_lens=torch.tensor(extends, dtype=torch.int32).to(case.device),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32).to(case.device),
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=extends,
    )


def compare_with_oracle(case: Case, ranks: list[Ran]) -> None:
    """What every rank has: the results of all rows, their order, and the pool."""
    for ran in ranks:
        assert torch.equal(ran.positions.cpu(), case.positions)
        for number in range(len(case.layers)):
            out, lse, *pool = case.expected(number)
            bound = rmse_bound(0.0, torch.float32, len(ranks), lse, score_size=float(lse.abs().max()))
            if case.x.dtype != torch.float32:
                bound += single_device_bound(case.x.dtype, lse)
            assert relative_rmse(ran.outs[number], out) <= bound
            assert torch.equal(ran.hidden[number], ran.outs[number])
            # The first page takes padding, whatever it is.
            assert all(torch.equal(x[case.page_size :], y[case.page_size :]) for x, y in zip(ran.pool[number], pool, strict=True))
