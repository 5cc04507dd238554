"""``cp_attention`` itself: finds the prepared call, has its transfers expected, and runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpattn.call import checks
from cpattn.call.agreed import describe, refusal_of, validated
from cpattn.call.arguments import Arguments
from cpattn.call.find import find_call
from cpattn.call.forward_context import ForwardContext, current_context
from cpattn.call.in_graph import cache_as_given, group_of, results_of
from cpattn.call.other_words import refuse_words
from cpattn.call.prepared import PreparedCall
from cpattn.graphs import leaves_graph
from cpattn.handles import resolve
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.ops import implements, parse_options
from cpattn.transports.agreement import expect_verdicts, share_verdicts
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer

# What cp_attention takes by keyword.
KEYWORDS = (
    "group",
    "v_dim",
    "kv_cache",
    "strategy",
    "backend",
    "overlap",
    "scale",
    "window",
    "softcap",
    "sinks",
    "out",
    "return_lse",
    "check",
    "label",
    "expand",
)


@leaves_graph
def run_attention(
    arguments: Arguments,
    meta: CPMetadata | None,
    group: Group,
    unknown: dict[str, Any],
    *,
    return_lse: bool = False,
    check: bool = False,
    label: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A call of ``cp_attention``: its result, and the LSE where that is asked for.

    Args:
        unknown: keywords that there are none of, to be refused.
    """
    context: ForwardContext | None = None
    if meta is None:
        context = current_context()
        arguments, meta = context.complete(arguments), context.meta
        group, check = context.group if group is None else group, check or context.check
    if type(meta) is not CPMetadata:
        checks.check_metadata(meta)
    transport = as_transport(group, meta.plan.cp_size)
    with InFlight(transport, meta.device) as in_flight:
        if check or unknown or label is not None:

            def validate() -> PreparedCall:
                if unknown:
                    refuse_words("cp_attention", unknown, KEYWORDS)
                return find_call(arguments, meta, transport, check=check)

            call = validated(validate, lambda call: describe(call, meta, arguments.kv_cache), meta.plan, in_flight, check, label)
        else:
            call = find_call(arguments, meta, transport)
        if check:

            def make() -> list[Transfer]:
                # First the memory of the verdicts: to make it after the call's could take that away again.
                verdicts = expect_verdicts(transport, meta.device)
                return [*call.transfers(), *verdicts]

            in_flight.expect(make)
            problems: list[str] = []
            result, lse = call.run(arguments, in_flight, problems)
            share_verdicts(in_flight, meta.device, refusal_of(problems))
        else:
            result, lse = call.make(arguments, meta, in_flight)
    if context is not None:
        context.calls += 1
    return result, call.lse_of(result, lse) if return_lse else None


# Written out, as arguments that are gathered and spread again would cost a microsecond.
@implements("attention")
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    meta: Tensor | None,
    order: Tensor | None,
    group: Tensor | None,
    options: str,
    sinks: Tensor | None,
    out: Tensor | None,
    kv_cache: PagedKV | PackedKV | None = None,
) -> tuple[Tensor, Tensor]:
    v_dim, strategy, backend, overlap, scale, window, softcap, return_lse, check, label, group_name = parse_options(options)
    arguments = Arguments(q, k, v, v_dim, kv_cache, strategy, backend, overlap, scale, window, softcap, sinks, out)
    given = None if meta is None else resolve(meta, CPMetadata)
    result, lse = run_attention(arguments, given, group_of(group, group_name), {}, return_lse=return_lse, check=check, label=label)
    return results_of(result, lse, out)


@implements("attention.paged")
def _operator_over_pages(*given: Any) -> tuple[Tensor, Tensor]:
    *call, k_pages, v_pages, page_table, cache = given
    return _operator(*[*call, cache_as_given(k_pages, v_pages, page_table, cache)])


@implements("attention.packed")
def _operator_over_packed_prefixes(*given: Any) -> tuple[Tensor, Tensor]:
    *call, packed_k, packed_v = given
    return _operator(*[*call, PackedKV(packed_k, packed_v)])
