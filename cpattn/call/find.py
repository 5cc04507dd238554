"""Finding the prepared call of some arguments: made at the first call of a kind, and remembered with the metadata."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch

from cpattn.attention.backend import AttentionOptions
from cpattn.call import checks
from cpattn.call.arguments import Arguments
from cpattn.call.cache_checks import check_cache
from cpattn.call.choose import choose, problem_of
from cpattn.call.page_checks import check_attend, check_writable
from cpattn.call.page_contents import check_page_contents
from cpattn.call.prepared import PreparedCall
from cpattn.call.slow_reference import warn_of_reference
from cpattn.call.tensor_kinds import check_no_fp8
from cpattn.kv_cache import PagedKV
from cpattn.memo import Memo
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.transports.transport import Transport

# Kinds of calls over one batch: a model has few.
_MOST_REMEMBERED = 64


class _Calls(Memo[Hashable, PreparedCall]):
    """The calls over one batch."""

    def __init__(self, plan: Layout) -> None:
        super().__init__(_MOST_REMEMBERED)
        self.plan = plan


_calls: WeakKeyDictionary[CPMetadata, _Calls] = WeakKeyDictionary()


def find_call(arguments: Arguments, meta: CPMetadata, transport: Transport, *, check: bool = False) -> PreparedCall:
    """Validates a call and finds, or makes, what is prepared for it: of further layers only the key is made.

    What a page table holds is looked at in every call, but on a GPU only with ``check``, as it means waiting for the device.
    Raises CPError in its subclasses.
    """
    key: Hashable = None
    call: PreparedCall | None = None
    calls = _calls.get(meta)
    if calls is None or calls.plan is not meta.plan:
        # Another batch of a bucket may be better served otherwise.
        calls = _calls[meta] = _Calls(meta.plan)
    try:
        key = transport, arguments.key()
        if not (torch.is_grad_enabled() and arguments.requires_grad()):
            call = calls.get(key)
    # Not what a caller should pass, without strides or a hash: the checks say so.
    except (TypeError, AttributeError, RuntimeError):
        key = None
    if call is None:
        call = prepare_call(arguments, meta, transport)
        if key is not None:
            calls.keep(key, call)
    if arguments.kv_cache is not None and (check or not arguments.q.is_cuda):
        check_contents(arguments, meta)
    return call


def check_contents(arguments: Arguments, meta: CPMetadata) -> None:
    """Looks at what a page table holds."""
    if isinstance(arguments.kv_cache, PagedKV):
        check_page_contents(arguments.kv_cache, meta, written=arguments.k is not None)


def prepare_call(arguments: Arguments, meta: CPMetadata, transport: Transport) -> PreparedCall:
    """Validates a call and chooses what serves it. Raises CPError in its subclasses."""
    if arguments.k is not None:
        checks.check_group(meta, transport)
    options = check_arguments(arguments, meta, with_cache=True)
    problem = problem_of(arguments, meta, options)
    choice = choose(arguments, problem, meta.plan)
    if isinstance(arguments.backend, str) and arguments.backend == "auto":
        warn_of_reference(choice.backend, problem, meta)
    if isinstance(arguments.kv_cache, PagedKV) and arguments.k is not None:
        check_writable(arguments.kv_cache)
    return PreparedCall(arguments, choice, options, meta, transport)


def check_arguments(arguments: Arguments, meta: CPMetadata, *, with_cache: bool) -> AttentionOptions:
    """What is refused of the arguments of a call, but for what no strategy or backend can serve.

    Args:
        with_cache: whether a cache that the plan needs may not be missing.
    """
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    if k is None:
        check_attend(q, cache, arguments.v_dim, meta)
    else:
        checks.check_qkv(q, k, v, arguments.v_dim, meta)
        check_no_fp8("q", q.dtype)
        if with_cache:
            check_cache(cache, k, v, meta)
        checks.check_overlap(arguments.overlap, k)
    options = checks.parse_options(q, meta, arguments.scale, arguments.window, arguments.softcap, arguments.sinks)
    if arguments.out is not None:
        v_like = v if v is not None else cache.v_pages if k is None and isinstance(cache, PagedKV) else None
        checks.check_out(arguments.out, q, int(arguments.v_dim or 0) if v_like is None else v_like.shape[-1])
    return options
