"""What ``auto`` chose for a kind of call, and why, in a line of the log: once a kind, where a call of it is prepared first."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import replace
from logging import DEBUG, INFO

from cpattn.byte_sizes import in_words
from cpattn.call.arguments import Arguments
from cpattn.call.choose import Choice
from cpattn.call.explain_choice import explain_backend, explain_strategy
from cpattn.exchange.resident_shards import is_resident
from cpattn.exchange.schedule import bytes_sent
from cpattn.log import logger
from cpattn.memo import Memo
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.problem import Problem

# Kinds of calls that the log has a line of. A kind that is met again after a thousand others has another one.
_told: Memo[Hashable, None] = Memo(1000)
# Ranks may be threads.
_telling = threading.Lock()


def log_choice(arguments: Arguments, choice: Choice, meta: CPMetadata) -> None:
    """INFO: for each kind of call for which ``auto`` chooses, what and why, in the words of :func:`cpattn.explain`. DEBUG:
    each call that is prepared."""
    log = logger()
    if log.isEnabledFor(INFO) and _is_new(_kind(arguments, choice, meta)):
        reasons = _reasons(arguments, choice, meta)
        if reasons:
            log.info("%s: %s", _in_words(choice.problem, meta), "; ".join(reasons))
    if log.isEnabledFor(DEBUG):
        names = choice.strategy.name, choice.backend.name
        sent = in_words(int(bytes_sent(choice.schedule)[meta.cp_rank]))
        log.debug("prepared %s on %s for %r: %d hops, %s sent in a call", *names, meta, len(choice.schedule), sent)


def _is_new(kind: Hashable) -> bool:
    with _telling:
        if kind in _told:
            return False
        _told.keep(kind, None)
        return True


def _kind(arguments: Arguments, choice: Choice, meta: CPMetadata) -> Hashable:
    """What lines are told apart by: all but the sizes of the batch, and what was chosen."""
    names = arguments.strategy, arguments.backend, choice.strategy.name, choice.backend.name
    return replace(choice.problem, rows=0), meta.plan.cp_size, meta.plan.sharded, names


def _reasons(arguments: Arguments, choice: Choice, meta: CPMetadata) -> list[str]:
    """Of the strategy and of the backend; none where ``auto`` chose neither."""
    names = choice.strategy.name, choice.backend.name
    by_auto = [isinstance(given, str) and given == "auto" for given in (arguments.strategy, arguments.backend)]
    if not any(by_auto):
        return []
    strategy, backend = (f"{name!r} (asked for)" for name in names)
    if by_auto[0]:
        strategy = _chosen(names[0], explain_strategy(choice, meta.plan))
    if by_auto[1]:
        backend = _chosen(names[1], explain_backend(choice))
    return [f"backend {backend}"] if is_resident(choice.strategy) else [f"strategy {strategy}", f"backend {backend}"]


def _chosen(chosen: str, explained: Mapping[str, str]) -> str:
    """``'cpu' (chosen)``, and what was tried before it with the reason why it was passed over."""
    tried = list(explained)[: list(explained).index(chosen)]
    passed_over = "".join(f", before it {name!r} ({explained[name]})" for name in tried)
    return f"{chosen!r} ({explained[chosen]}){passed_over}"


def _in_words(problem: Problem, meta: CPMetadata) -> str:
    """A kind of call."""
    dims = f"{problem.head_dim}" if problem.head_dim == problem.v_head_dim else f"{problem.head_dim}/{problem.v_head_dim}"
    extras = [f"window {problem.window}"] if problem.window is not None else []
    extras += [f"softcap {problem.softcap:g}"] if problem.softcap is not None else []
    extras += ["sinks"] if problem.sinks else []
    stored = "" if problem.kv_dtype is None else f" in {str(problem.kv_dtype).removeprefix('torch.')}"
    extras += [f"a {problem.cache} cache{stored}{', sharded' if meta.plan.sharded else ''}"] if problem.cache else []
    extras += ["a bucket"] if problem.fixed else []
    extras += [f"expanded from a latent of {problem.latent_dim}"] if problem.expands else []
    ranks = "1 rank" if meta.plan.cp_size == 1 else f"{meta.plan.cp_size} ranks"
    dtype = str(problem.dtype).removeprefix("torch.")
    with_extras = f" with {', '.join(extras)}" if extras else ""
    return f"{ranks}, {problem.q_heads}/{problem.kv_heads} heads of {dims} in {dtype} on {problem.device}{with_extras}"
