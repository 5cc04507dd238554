"""A validation whose outcome all ranks share: what ``check=True`` asks for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from cpattn.call import checks
from cpattn.call.prepared import PreparedCall
from cpattn.errors import BackendError
from cpattn.exchange.resident_shards import is_resident
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan
from cpattn.problem import Problem
from cpattn.transports.agreement import Account, agree
from cpattn.transports.in_flight import InFlight

T = TypeVar("T")
_CACHES = {"packed": "PackedKV", "paged": "PagedKV", None: "none"}


def validated(
    validate: Callable[[], T], describe: Callable[[T], str], plan: Plan | None, in_flight: InFlight, check: bool, label: str | None
) -> T:
    """What ``validate`` returns; with ``check``, after all ranks have said that they got as far with this plan."""
    if not check:
        if label is not None:
            checks.check_label(label)
        return validate()
    # In words for who reads of it, and with what tells any two plans apart.
    account = Account("", "" if plan is None else f"{plan!r}, {plan.num_prefix_tokens} cached, {plan.fingerprint}", "")
    try:
        checks.check_label(label)
        account = account._replace(label=label or "")
        value = validate()
    except Exception as refusal:
        agree(in_flight, in_flight.device, account._replace(refusal=refusal))
        raise
    agree(in_flight, in_flight.device, account._replace(arguments=describe(value)))
    return value


def describe(call: PreparedCall, meta: CPMetadata, cache: PackedKV | PagedKV | None) -> str:
    """What must be the same on every rank for the results to fit together, scales of heads included, which are read. The backend is each
    rank's own affair, but where ranks read each other's memory: how keys lie there is the kernel's."""
    problem = call.problem
    # A backend may differ, and so may the alignment of pools.
    shared = f", keys late={call.waits_for_keys}/{call.reads_in_place}" if call.transport.shares_memory else ""
    own = " of own heads" if problem.own_heads else ""
    asked = "attend" if is_resident(call.strategy) else f"strategy={call.strategy.name}"
    return (
        f"{asked}, {problem.q_heads}/{problem.kv_heads} heads of {problem.head_dim}/{problem.v_head_dim}, "
        f"{problem.dtype}, scale={problem.scale}, window={problem.window}, softcap={problem.softcap}, "
        f"sinks={'yes' if problem.sinks else 'no'}, overlap={problem.overlap}, v={_values(problem)}, "
        f"rows={problem.rows}, bucket={meta.bucket}, cache={_CACHES[problem.cache]}{own}{_stored(problem, cache)}{shared}"
    )


def _values(problem: Problem) -> str:
    """Where they come from."""
    return f"expanded from {problem.latent_dim}" if problem.expands else "in k" if problem.v_in_k else "given"


def _stored(problem: Problem, cache: PackedKV | PagedKV | None) -> str:
    """How K and V travel, if not as they come."""
    if problem.kv_dtype is None:
        return ""
    words = f" in {problem.kv_dtype} with scales of {problem.scales or 'nothing'}"
    if problem.scales == "head" and isinstance(cache, PagedKV):
        words += "".join(
            f", {name}={_of_heads(scale, problem.kv_heads)}"
            for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale))
            if scale is not None
        )
    return words


def _of_heads(scale: Tensor, heads: int) -> str:
    """The scales of heads in few words: all of them have to be the same, to the bit. One for all is that of each."""
    values = scale.detach().cpu().reshape(-1).expand(heads).contiguous()
    # Nine digits tell any two numbers of fp32 apart.
    least, most = (f"{float(x):.9g}" for x in values.aminmax())
    digest = hashlib.blake2b(values.numpy().tobytes(), digest_size=4).hexdigest()
    return least if least == most else f"{least} to {most} (those of all heads: {digest})"


def refusal_of(problems: list[str]) -> BackendError | None:
    """What a checked call raises where a caller's kernel is wrong."""
    if not problems:
        return None
    more = f" ({len(problems) - 1} more launches differ)" if len(problems) > 1 else ""
    return BackendError(f"{problems[0]}{more}; cpattn.testing.check_backend says in a table what holds of a kernel and what does not")
