"""Finding the prepared call of some arguments: made at the first call of a kind, and remembered with the batch's metadata.

Another batch of a bucket may be better served otherwise: with the batch its calls are forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from cpattn.call import checks
from cpattn.call.arguments import Arguments
from cpattn.call.check_call import check_arguments, check_written
from cpattn.call.choose import Choice, choose, problem_of
from cpattn.call.contents import check_own_contents, check_shared_contents
from cpattn.call.log_choice import log_choice
from cpattn.call.prepared import PreparedCall
from cpattn.call.slow_reference import warn_of_reference
from cpattn.errors import UnsupportedError
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.resident_shards import is_resident
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.problem import Problem
from cpattn.transports.transport import Transport


def find_call(arguments: Arguments, meta: CPMetadata, transport: Transport, *, check: bool = False) -> PreparedCall:
    """Validates a call and finds, or makes, what is prepared for it: of further layers only the key is made.

    What a page table holds is looked at in every call, but on a GPU only with ``check``, as it means waiting for the device; see
    :mod:`cpattn.call.contents`.
    Raises CPError in its subclasses.
    """
    key: Hashable = None
    call: PreparedCall | None = None
    try:
        key = transport, arguments.key()
        if not (torch.is_grad_enabled() and arguments.requires_grad()):
            call = meta.memo.get(key)
    # Not what a caller should pass, without strides or a hash: the checks say so.
    except (TypeError, AttributeError, RuntimeError):
        key = None
    if call is None:
        call = prepare_call(arguments, meta, transport)
        if key is not None and transport.lasts:
            meta.memo.keep(key, call)
    elif arguments.kv_cache is not None:
        call.check_batch(arguments, meta)
    if arguments.kv_cache is not None:
        check_contents(arguments, meta, check)
    return call


def check_contents(arguments: Arguments, meta: CPMetadata, check: bool) -> None:
    """Looks at what is to be found before anything is sent: with ``check``, also at what each rank has for itself."""
    cache = arguments.kv_cache
    if isinstance(cache, PagedKV) and (check or not arguments.q.is_cuda):
        check_shared_contents(cache, meta, written=not is_resident(arguments.strategy))
        if check:
            check_own_contents(cache, arguments.k, arguments.v, meta)


def _choice(arguments: Arguments, problem: Problem, meta: CPMetadata, transport: Transport) -> Choice:
    """What was chosen for the same call over this batch, or is now. Strides and addresses are each rank's own affair, and what is known of
    links may change between two calls: all ranks choose at the same one."""
    key = "choice", transport, problem, arguments.strategy, arguments.backend
    try:
        found: Choice | None = meta.memo.get(key)
    except TypeError:  # what a caller passes may have no hash
        return choose(arguments, problem, meta.plan, transport)
    if found is None:
        found = choose(arguments, problem, meta.plan, transport)
        if transport.lasts:
            meta.memo.keep(key, found)
    return found


def prepare_call(arguments: Arguments, meta: CPMetadata, transport: Transport) -> PreparedCall:
    """Validates a call and chooses what serves it. Raises CPError in its subclasses."""
    if arguments.strategy is not RESIDENT:
        checks.check_group(meta, transport)
    options = check_arguments(arguments, meta)
    problem = problem_of(arguments, meta, options)
    choice = _choice(arguments, problem, meta, transport)
    reason = choice.strategy.why_not_over(transport)
    if reason is not None:
        raise UnsupportedError(f"strategy={choice.strategy.name!r} cannot go over {transport}: {reason}")
    if isinstance(arguments.backend, str) and arguments.backend == "auto":
        warn_of_reference(choice.backend, problem, meta)
    log_choice(arguments, choice, meta)
    check_written(arguments)
    return PreparedCall(arguments, choice, options, meta, transport)
