"""The calls that a model makes: shard the input, attend, unshard the output."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from cpattn.call import checks
from cpattn.call.agreed import describe, validated
from cpattn.call.arguments import Arguments, BackendChoice, StrategyChoice
from cpattn.call.attention import KEYWORDS, run_attention
from cpattn.call.check_call import check_arguments
from cpattn.call.choose import choose, problem_of
from cpattn.call.explain_arrival import explain_arrival, explain_pages
from cpattn.call.explain_choice import compared_on, comparison, explain_backend, explain_expansion, explain_strategy
from cpattn.call.find import check_contents, prepare_call
from cpattn.call.in_graph import (
    are_options,
    attention_in_graph,
    enters_graph,
    group_fits,
    group_handle,
    group_name,
    group_of,
    is_plain,
    is_traced,
    order,
)
from cpattn.call.other_words import refuse_words
from cpattn.call.prepared import PreparedCall, on_device_of
from cpattn.exchange.all_gather import ALL_GATHER, explain_gathered
from cpattn.exchange.divided_heads import DividedHeads, explain_across, explain_heads
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.pass_q_with_new_keys import brings_new_keys, explain_beside_keys
from cpattn.exchange.ring import RING
from cpattn.exchange.ring_keys import explain_ring_keys
from cpattn.exchange.traveling_queries import explain_queries
from cpattn.exchange.two_level import TwoLevel, explain_levels
from cpattn.expansion import ExpandFunction
from cpattn.graphs import has_operator, leaves_graph
from cpattn.handles import resolve
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.auto_partition import explain_partition
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.moves.moves import moves_for, whole_rows
from cpattn.ops import implements, options_text, parse_options
from cpattn.transports.gather import gather_whole
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight


@has_operator
def shard(x: Tensor, meta: CPMetadata, *, dim: int = 0) -> Tensor:
    """This rank's rows of a tensor that holds all new tokens of the batch.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 6)], cp_size=2, cp_rank=0)
    >>> cpattn.shard(torch.arange(6), meta)
    tensor([0, 1, 5])
    >>> cpattn.shard(torch.arange(18).view(3, 6), meta, dim=1)  # position ids of M-RoPE
    tensor([[ 0,  1,  5],
            [ 6,  7, 11],
            [12, 13, 17]])

    Args:
        x: ``[plan.num_tokens, ...]`` of any dtype, request after request; the same on every rank. An engine's own padding
            after the last token is ignored, up to ``cp_size * meta.rows`` rows in all: one that rounds its token count up
            to a multiple of n plans with ``pad_to=n``.
        meta: this rank's metadata.
        dim: the axis along which the tokens lie: 1 for ``[1, num_tokens, D]``, or for position ids ``[3, num_tokens]``.

    Returns:
        ``[meta.rows, ...]`` in local order, zeros on padding; with ``dim``, the rows lie along that axis. A copy, contiguous.

    Raises:
        RowCountError: x has fewer rows than the batch has new tokens, or more than padding can explain.
        TensorMismatchError: x is on another device than the metadata, or of a kind that kernels cannot read.
        OptionError: x has no such axis.
    """
    if is_traced() and type(meta) is CPMetadata and type(dim) is int and isinstance(x, Tensor) and is_plain(x):
        rows, _ = meta.sizes_in_graph()
        local: Tensor = torch.ops.cpattn.shard.default(x, meta.handle, rows, dim)
        return local
    return _shard(x, meta, dim)


@leaves_graph
def _shard(x: Tensor, meta: CPMetadata, dim: int) -> Tensor:
    checks.check_metadata(meta)
    checks.check_tensor("x", x)
    dim = checks.parse_dim(dim, x)
    checks.check_whole("x", x, dim, meta)
    checks.check_device("x", x, meta)
    rows_first = x.movedim(dim, 0) if dim else x
    if x.requires_grad and torch.is_grad_enabled():
        tokens = rows_first.index_select(0, meta.token_index[: meta.num_tokens])
        local = torch.cat([tokens, rows_first.new_zeros(meta.rows - meta.num_tokens, *rows_first.shape[1:])])
    else:
        local = rows_first.new_empty(meta.rows, *rows_first.shape[1:])
        with on_device_of(x):
            # Padding has index -1, which stands for zeros.
            moves_for(x.device).gather_rows(local, whole_rows(rows_first), meta.token_index)
    return local.movedim(0, dim).contiguous() if dim else local


@implements("shard")
def _shard_operator(x: Tensor, meta: Tensor, rows: int, dim: int) -> Tensor:
    return _shard(x, resolve(meta, CPMetadata), dim)


@has_operator
def unshard(x: Tensor, meta: CPMetadata, *, group: Group = None, check: bool = False, label: str | None = None) -> Tensor:
    """Brings the rows of all ranks together, in the original order, on every rank. A collective call.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 3)], cp_size=1, cp_rank=0)
    >>> cpattn.unshard(torch.tensor([5.0, 6.0, 7.0]), meta)
    tensor([5., 6., 7.])

    Args:
        x: ``[meta.rows, ...]`` of any dtype, in local order; what padding rows hold does not matter.
        meta: this rank's metadata.
        group: as in :func:`cp_attention`.
        check, label: as in :func:`cp_attention`.

    Returns:
        ``[plan.num_tokens, ...]``; with a bucket, whose sizes do not change, ``[cp_size * rows, ...]``, zeros after the
        tokens.

    Raises:
        RowCountError, TensorMismatchError, GroupError, UnsupportedError (a gradient is required), DisagreementError.
    """
    if (
        is_traced()
        and type(meta) is CPMetadata
        and isinstance(x, Tensor)
        and is_plain(x)
        and group_fits(group)
        and are_options({"check": check, "label": label})
    ):
        _, rows = meta.sizes_in_graph()
        options = options_text({"check": check, "label": label, "group_name": group_name(group)})
        whole: Tensor = torch.ops.cpattn.unshard.default(x, meta.handle, order(), group_handle(group), rows, options)
        return whole
    return _unshard(x, meta, group, check, label)


@leaves_graph
def _unshard(x: Tensor, meta: CPMetadata, group: Group, check: bool = False, label: str | None = None) -> Tensor:
    checks.check_metadata(meta)
    transport = as_transport(group, meta.plan.cp_size)

    def validate() -> str:
        checks.check_group(meta, transport)
        checks.check_tensor("x", x)
        whole = " (x has all tokens of the batch already)" * (len(x) == meta.plan.num_tokens)
        fix = f"unshard takes this rank's rows, as cp_attention returns them, with the metadata of that call{whole}"
        checks.check_rows("x", x, meta, fix)
        checks.check_device("x", x, meta)
        checks.check_no_grad(x=x)
        return f"unshard, {tuple(x.shape[1:])} {x.dtype}, rows={meta.rows}, bucket={meta.bucket}"

    with InFlight(transport, meta.device) as in_flight:
        validated(validate, str, meta.plan, in_flight, check, label)
        if (meta.plan.cp_size == 1 or meta.plan.all_queries) and meta.bucket is None:
            return x[: meta.num_tokens].clone()
        if meta.plan.all_queries:
            is_padding = (meta.token_index < 0).view(-1, *[1] * (x.ndim - 1))
            return x.masked_fill(is_padding, 0)
        gathered = gather_whole(in_flight, "unshard", whole_rows(x) if x.is_conj() else x)
        out = x.new_empty(meta.restore_index.shape[0], *x.shape[1:])
        with on_device_of(x):
            moves_for(x.device).gather_rows(out, gathered, meta.restore_index)
        return out


@implements("unshard")
def _unshard_operator(x: Tensor, meta: Tensor, order: Tensor | None, group: Tensor | None, rows: int, options: str) -> Tensor:
    asked = parse_options(options)
    return _unshard(x, resolve(meta, CPMetadata), group_of(group, asked.group_name), asked.check, asked.label)


@overload
def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: CPMetadata | None,
    *,
    group: Group = ...,
    v_dim: int | None = ...,
    kv_cache: PackedKV | PagedKV | None = ...,
    strategy: StrategyChoice = ...,
    backend: BackendChoice = ...,
    overlap: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    check: bool = ...,
    label: str | None = ...,
    expand: ExpandFunction | None = ...,
) -> Tensor: ...


@overload
def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: CPMetadata | None,
    *,
    group: Group = ...,
    v_dim: int | None = ...,
    kv_cache: PackedKV | PagedKV | None = ...,
    strategy: StrategyChoice = ...,
    backend: BackendChoice = ...,
    overlap: int | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
    check: bool = ...,
    label: str | None = ...,
    expand: ExpandFunction | None = ...,
) -> tuple[Tensor, Tensor]: ...


@has_operator
def cp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: CPMetadata | None,
    *,
    group: Group = None,
    v_dim: int | None = None,
    kv_cache: PackedKV | PagedKV | None = None,
    strategy: StrategyChoice = "auto",
    backend: BackendChoice = "auto",
    overlap: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
    label: str | None = None,
    expand: ExpandFunction | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of this rank's queries over the whole context. A collective call: every rank makes it alike.

    The query at absolute position p of a request attends to keys 0 .. p of that request, to nothing else.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 5), (0, 3)], cp_size=1, cp_rank=0)
    >>> q, k, v = torch.randn(8, 4, 64), torch.randn(8, 2, 64), torch.randn(8, 2, 64)
    >>> cpattn.cp_attention(q, k, v, meta).shape
    torch.Size([8, 4, 64])

    Args:
        q: ``[meta.rows, Hq, D]`` fp32, bf16 or fp16 (fp64 with the reference backend): this rank's rows, as
            :func:`shard` orders them. Padding rows may hold anything, here and in k and v. Where the plan has ``queries="all"``, all
            new tokens in this rank's share of the heads, of which rank r has the r-th.
        k: ``[meta.rows, Hkv, D]``, rotated by ``meta.position_ids`` where the model rotates; Hq must be a multiple of Hkv. With
            ``queries="all"`` of all KV heads that any rank's queries see, alike on each; rows that others hold are not looked at.
        v: ``[meta.rows, Hkv, Dv]``; or None where V is the first ``v_dim`` columns of K, as in the latent attention of
            DeepSeek models (MLA, arXiv:2405.04434: one KV head, D = 576, ``v_dim`` = 512). The latent then travels once.
        meta: this rank's metadata, on the tensors' device; or None within a :func:`cpattn.forward_context`, which has it.
        group: a ProcessGroup, a DeviceMesh of one axis, or of two (for all ranks of both, as :func:`cpattn.hybrid` may divide them), a
            Transport, or None for the default group. With cp_size 1 none is needed. Calls over one group follow each other, in the
            same order on every rank; for several at once give each thread a process group of its own
            (``torch.distributed.new_group``).
        v_dim: the head dim of V where v is None.
        kv_cache: the keys and values of the prefixes, if the batch has any. A :class:`PackedKV` is read; to a
            :class:`PagedKV` this call's keys and values are written as well: every token's on every rank; where the plan has
            ``prefix_shards`` or ``prefix_ranks``, each rank's own; with an ``owner``, those that the rule gives this rank. For a
            strategy that divides heads it may have this rank's KV heads alone.
        strategy: ``"all_gather"`` or ``"ring"``, in which keys travel; ``"pass_q"`` or ``"pass_q_ring"``, in which queries
            do, for a sharded cache; ``"ulysses"``, in which ranks exchange rows for heads; ``"helix"`` for plans with
            ``queries="all"``; ``"auto"``; what :func:`cpattn.hybrid` or :func:`cpattn.two_level` makes; or a Strategy of your own.
        backend: a name from ``cpattn.BACKENDS``, ``"auto"`` for the fastest that can serve the call, or a function of your
            own: see :func:`cpattn.custom_backend`.
        overlap: into how many groups of KV heads an all-gather is split, so that over collectives the attention of one group runs
            while the next is in flight. It must divide Hkv, and be the same on every rank. It changes no result. None is 1: between two
            H100 over NVLink every split made every batch slower; over slower links one may pay.
        scale: of the scores; 1 / sqrt(D) if None.
        window: each query sees the last ``window`` keys up to and with its own; all if None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2 (arXiv:2408.00118); none if None.
        sinks: floating ``[Hq]``, one more logit without a value in each query's softmax, as in gpt-oss; none if None.
        out: ``[meta.rows, Hq, Dv]`` in q's dtype, any strides: memory that the result is written to, and that is returned.
        return_lse: also return the log-sum-exp of the scaled (and capped) scores, sinks included.
        check: compare plan and arguments of all ranks first, in one small collective that waits for the device. A mistake
            on one rank then raises on all, instead of hanging the others. A few rows of what a caller's own kernel returns
            are compared with the reference. What a page table on a GPU holds is then looked at as well. For tests and bring-up. (A
            rank that passes another group cannot tell the others; nor can one in whose compiled graph the metadata, the cache or the group
            are gone.)
        label: a name of this call, such as ``"step 17, layer 3"``, which ``check`` compares as well, beside a running number of
            the calls over the group. By its label a layer is found that one rank has skipped or swapped.
        expand: for the prefill of MLA: k is a latent ``[meta.rows, 1, L]``, v is None, and this function gives the keys and values of
            some heads of its rows: ``expand(latent [n, 1, L], heads)`` returns ``k [n, h, D]`` and ``v [n, h, Dv]`` of those h query
            heads, a slice, with ``v_dim`` as Dv. The latent travels once and is what caches have. Each rank expands what it attends to,
            a group of heads at a time (:data:`cpattn.expansion.MOST_BYTES`), on a GPU on a stream of its own. It runs without gradients,
            is captured by CUDA graphs, and ends compiled graphs. :func:`cpattn.latent_expansion` makes one of a weight.

    Returns:
        ``out [meta.rows, Hq, Dv]`` in q's dtype, zeros on padding; with ``return_lse`` also ``lse [meta.rows, Hq]``,
        fp32, natural log, -inf on padding.

    Raises:
        CPError: in its subclasses (see :mod:`cpattn.errors`), before anything is sent or written. On the CPU, and on a GPU
            with ``check``, so do a page that does not exist, a slot that is written for two tokens, K and V pages with
            an element in common, and scales of heads that are no positive, finite numbers. What each rank has for itself, its pages of a
            sharded cache and new keys and values that pages cannot hold, is refused in the middle of the call where there is no
            ``check``, by that rank alone, and nothing is written there.
        GroupError: also in the middle of a call, where a transfer fails; every later call on the group raises it as well.
        BackendError: in the middle of a call, where a caller's kernel returns what is no result, or, with ``check``, a wrong
            one.
        TensorMismatchError: also in the middle of a call, where ``expand`` returns tensors of another shape, dtype or device.

    A caller's kernel or its ``expand`` may raise in the middle of a call, or memory may run out. The exception leaves only after this rank
    has carried out its part of the call's transfers, with NaN for what it could not compute. So the other ranks return:
    NaN, and LSE NaN, in the rows that see keys which it could not send, or, where queries travel, in all rows, padding
    included. After that all ranks can go on with the group.
    """
    arguments = Arguments(q, k, v, v_dim, kv_cache, strategy, backend, overlap, scale, window, softcap, sinks, out, expand)
    if enters_graph(meta):
        results = attention_in_graph(arguments, meta, group, {"return_lse": return_lse, "check": check, "label": label, **unknown})
        if results is not NotImplemented:
            return results  # type: ignore[no-any-return]
    result, lse = run_attention(arguments, meta, group, unknown, return_lse=return_lse, check=check, label=label)
    return result if lse is None else (result, lse)


@leaves_graph
def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: CPMetadata,
    *,
    group: Group = None,
    v_dim: int | None = None,
    kv_cache: PackedKV | PagedKV | None = None,
    strategy: StrategyChoice = "auto",
    backend: BackendChoice = "auto",
    overlap: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
    label: str | None = None,
    expand: ExpandFunction | None = None,
    **unknown: Any,
) -> PreparedCall:
    """A :func:`cp_attention` call to hold: validated and chosen here, made as often as it is called. It spares each layer the
    lookup, and can be looked at.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 5), (0, 3)], cp_size=1, cp_rank=0)
    >>> q, k, v = torch.randn(8, 4, 64), torch.randn(8, 2, 64), torch.randn(8, 2, 64)
    >>> attention = cpattn.prepare(q, k, v, meta)
    >>> attention(q, k, v).shape
    torch.Size([8, 4, 64])
    >>> attention.strategy.name, attention.backend.name
    ('all_gather', 'cpu')

    Arguments and errors are those of :func:`cp_attention`. Of the tensors only kinds and layouts are looked at. Those of each
    layer are given to the call, ``attention(q, k, v, kv_cache=None, sinks=None, out=None, expand=None)``. It returns what cp_attention
    would, within torch.inference_mode() or outside of it. Nothing is computed or sent, but for ``check``, with which the ranks
    compare what they have prepared.

    Returns:
        A :class:`PreparedCall`. It is valid as long as ``meta`` and the group: for metadata with a bucket also after
        ``meta.copy_(...)``.
    """
    checks.check_metadata(meta)
    transport = as_transport(group, meta.plan.cp_size)
    arguments = Arguments(q, k, v, v_dim, kv_cache, strategy, backend, overlap, scale, window, softcap, sinks, out, expand)

    def validate() -> PreparedCall:
        if unknown:
            refuse_words("prepare", unknown, KEYWORDS)
        if torch.is_grad_enabled() and arguments.requires_grad():
            checks.check_no_grad(**arguments.tensors())
        call = prepare_call(arguments, meta, transport)
        check_contents(arguments, meta, check)
        return call

    with InFlight(transport, meta.device) as in_flight:
        call = validated(validate, lambda call: describe(call, meta, arguments.kv_cache), meta.plan, in_flight, check, label)
    return call.hold(meta, returns_lse=return_lse)


@leaves_graph
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: CPMetadata,
    *,
    v_dim: int | None = None,
    kv_cache: PackedKV | PagedKV | None = None,
    strategy: StrategyChoice = "auto",
    overlap: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    group: Group = None,
    expand: ExpandFunction | None = None,
) -> dict[str, str]:
    """What ``backend="auto"`` would do with such a call: for each backend ``"chosen"``, ``"able"``, or the reason why it was passed
    over, with the microseconds that a call is estimated to take with it, the fastest first. With a PagedKV it also says whether the
    backend reads the pages or a packed copy of them, and of ``triton`` which kernel and which launch it uses.
    Under ``"strategy"`` it says what was chosen, and what decided: the two fastest ways by estimate, for which machine, over which
    transport, and whether as a CUDA graph or eagerly. Without a group GPUs are taken to read each other's memory.
    Under ``"partition"`` it says what the plan's is, and which one ``partition="auto"`` takes for such a batch and why.
    Needs no group and computes nothing. With a group it says under ``"transport"`` what carries its bytes, and why. Where the
    strategy is ``all_gather`` or ``ring`` it says under ``"keys"`` how many keys and values travel before the attention, how many beside it
    or after it, and why; where ranks read each other's memory also whether an all-gather's come beside the attention. It says there as
    well where they go into pages after the attention, which sees them in order. Of a hybrid it says the same across its groups, and of two
    levels across hosts and within them. Of ``pass_q`` and ``pass_q_ring`` it says under ``"queries"`` the same of queries. Where a strategy
    divides heads, it says under ``"heads"`` how many each rank has. With ``expand`` it says under ``"latent"`` how many heads that is
    expanded to at a time.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 4), (0, 4)], cp_size=2, cp_rank=0, partition="whole")
    >>> q = torch.randn(4, 2, 64)
    >>> explained = cpattn.explain(q, q, q, meta, softcap=30.0)
    >>> explained["reference"], explained["keys"]
    ('chosen', 'none travel: each rank holds all that its queries see')

    The arguments mean what they mean to :func:`cp_attention`; of its errors those about them are raised.
    """
    checks.check_metadata(meta)
    options: dict[str, Any] = {"overlap": overlap, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks, "expand": expand}
    arguments = Arguments(q, k, v, v_dim, kv_cache, strategy, **options)
    checked = check_arguments(arguments, meta, with_cache=kv_cache is not None)
    transport = None if group is None else as_transport(group, meta.plan.cp_size)
    choice = choose(arguments, problem_of(arguments, meta, checked), meta.plan, transport)
    by_auto = isinstance(strategy, str) and strategy == "auto"
    why = explain_strategy(choice, meta.plan)[choice.strategy.name] if by_auto else f"asked for, {comparison(choice) or 'as it is'}"
    explained = explain_backend(choice) | {"strategy": f"{choice.strategy.name}: {why}"}
    explained = explained | {"partition": explain_partition(meta.plan, choice.problem, compared_on(choice))}
    if choice.strategy in (ALL_GATHER, RING):
        gathers = choice.strategy is ALL_GATHER
        keys = (explain_gathered if gathers else explain_ring_keys)(choice.problem, meta.plan)
        explained = explained | {"keys": keys + (explain_arrival(choice, meta.plan) if gathers else "")}
    elif choice.strategy is PASS_Q and brings_new_keys(choice.problem, meta.plan):
        explained = explained | {"queries": explain_beside_keys(choice.problem, meta.plan)}
    elif choice.strategy is PASS_Q_RING and meta.plan.owner is not None:
        explained = explained | {"queries": explain_beside_keys(choice.problem, meta.plan, hop_by_hop=True)}
    elif choice.strategy in (PASS_Q, PASS_Q_RING):
        explained = explained | {"queries": explain_queries(choice.problem, meta.plan)}
    elif isinstance(choice.strategy, TwoLevel):
        levels = explain_levels(choice.strategy, choice.problem, meta.plan)
        explained = explained | {"keys": levels + explain_pages(choice, meta.plan)}
    if expand is not None:
        explained = explained | {"latent": explain_expansion(choice, meta.plan)}
    if isinstance(choice.strategy, DividedHeads):
        explained = explained | {"heads": explain_heads(choice.strategy, choice.problem, meta.plan)}
        across = explain_across(choice.strategy, choice.problem, meta.plan)
        explained = explained if across is None else explained | {"keys": across}
    return explained if transport is None else explained | {"transport": transport.describe()}
