"""What an all-gather does: keys come before the attention, beside it, or into pages."""

from __future__ import annotations

from cpattn.costs.order_or_pages import attends_over_pages
from cpattn.costs.steps.pieces import copy_pages, copy_stored, outputs
from cpattn.costs.steps.tally import Choice, Most, Tally
from cpattn.exchange.late_pages import may_come_late
from cpattn.exchange.schedule import Hop
from cpattn.exchange.traveling_keys import Traveling, traveling_keys
from cpattn.exchange.traveling_over_shards import traveling_over_shards
from cpattn.kernels.tile_shapes import has_specialized


def all_gather(choice: Choice) -> Tally:
    """Pack, gather, put in order, attend: for each group of heads, of which all set out at once."""
    plan, problem, *_ = choice
    tally, groups = Tally(choice), problem.overlap
    (hop,) = choice.schedule
    if plan.sharded:
        return new_keys_in_order(choice)
    traveling = traveling_keys(problem, plan)
    comes_late = keys_come_late(choice, traveling)
    if problem.cache == "paged" and comes_late:
        return _late_into_pages(tally, hop)
    is_paged = problem.cache == "paged"
    over_pages = attends_over_pages(problem, plan, choice.machine, choice.kernel, choice.backend)
    for group in range(groups):
        if problem.cache == "packed":
            tally.move_rows(_copied_prefix(choice), groups)
        if over_pages:
            _collect_into_pages(tally, traveling)
            copy_pages(tally, Most.of(plan).both // groups)
        elif is_paged:
            _collect_into_pages(tally, traveling)
            _put_in_order_before(tally, traveling)
        else:
            _collect(tally, traveling, comes_late=comes_late)
        (seconds,) = tally.attend(hop, groups=groups, over_pages=over_pages)
        reads_needed = choice.transport == "peer_memory" and not is_paged
        rows = traveling.needed if reads_needed else max(traveling.needed, int(traveling.sent.max()))
        received = rows * problem.key_bytes // groups
        # What follows another is hidden as far as the attention to that one goes; nobody waits for it to begin.
        tally.gather(received, seconds if group or comes_late else 0.0, comes_late=comes_late)
        if group and received and choice.link.hides_gather:
            tally.exposed -= min(choice.link.latency, seconds)
        _rest_into_pages(tally, traveling, seconds)
        if groups > 1:
            # Into some heads of the result: a copy with strides, at half the speed. A kernel that writes there itself is not known to be
            # any faster, as splits were measured with copies alone.
            tally.move(4 * outputs(choice) * problem.dtype.itemsize // groups)
    return tally


def new_keys_in_order(choice: Choice) -> Tally:
    """Packed, gathered, written to the pages of those who hold them, put in order: with what a window reaches beside them, or alone."""
    tally, problem, (hop,) = Tally(choice), choice.problem, choice.schedule
    travels = traveling_over_shards(problem, choice.plan)
    # Who reads others' memory reads what it wants alone.
    received, sent = travels.received * problem.key_bytes, int(hop.sent.max(initial=0))
    tally.gather(received if choice.transport == "peer_memory" else max(received, sent))
    tally.move(travels.put * problem.key_bytes + received, launches=3)
    tally.move(2 * problem.rows * problem.key_bytes)
    tally.attend(hop)
    return tally


def keys_come_late(choice: Choice, traveling: Traveling) -> bool:
    """Whether the attention begins while others' keys still come: all heads at once, read from the memory of peers."""
    problem, kernel = choice.problem, choice.kernel
    if choice.transport != "peer_memory" or not (kernel.waits_for_keys and _has_hopper_kernel(choice)):
        return False
    if problem.cache == "paged":
        return kernel.reads_in_place and may_come_late(problem, choice.plan, traveling)
    return traveling.what != "nothing" and problem.overlap == 1


def _has_hopper_kernel(choice: Choice) -> bool:
    """That attends to keys in order, and to prefixes wherever they lie."""
    problem = choice.problem
    if problem.v_in_k or problem.expands or problem.stored_dtype != problem.dtype:
        return False
    return has_specialized(problem.head_dim, problem.v_head_dim, problem.dtype, choice.machine.capability, problem.page_size or 0)


def _late_into_pages(tally: Tally, hop: Hop) -> Tally:
    """All new keys come late into order, beside prefixes in pages, and are written there after the attention."""
    choice = tally.choice
    plan, key_bytes = choice.plan, choice.problem.key_bytes
    tally.move(2 * choice.problem.rows * key_bytes)
    if Most.of(plan).beyond_units:
        tally.move_rows(Most.of(plan).beyond_units, 1)
    (seconds,) = tally.attend(hop)
    tally.gather((plan.num_tokens - min(plan.rank_tokens)) * key_bytes, seconds, comes_late=True)
    tally.move_rows(plan.num_tokens, 1)
    return tally


def _copied_prefix(choice: Choice) -> int:
    """Tokens of packed prefixes that a rank copies in order: all that it sees, or what shares a block with new tokens."""
    return Most.of(choice.plan).beyond_units if _reads_in_place(choice) else Most.of(choice.plan).prefix


def _reads_in_place(choice: Choice) -> bool:
    return choice.kernel.reads_in_place and _has_hopper_kernel(choice)


def _collect(tally: Tally, traveling: Traveling, *, comes_late: bool) -> None:
    """New keys of a group of heads into and out of messages, and to their places, those of requests that are whole on a rank only where it
    cannot read them as they lie."""
    choice, groups, most = tally.choice, tally.choice.problem.overlap, Most.of(tally.choice.plan)
    own, new = (most.put, most.new_put) if _reads_in_place(choice) else (choice.problem.rows, most.new)
    if traveling.what == "nothing":
        if choice.problem.cache is not None:
            tally.move_rows(new, groups)
        return
    if comes_late:
        # One launch puts a rank's own rows where they are attended to, and others read them, and brings theirs. The attention is launched
        # as a dependent, and its first tiles wait.
        tally.move(2 * own * choice.problem.key_bytes)
        return
    tally.move_rows(own if traveling.what == "needed" and choice.transport != "peer_memory" else choice.problem.rows, groups)
    if choice.transport == "peer_memory":
        # What arrives goes straight to its place, and so do a rank's own rows.
        tally.move_rows(own, groups, launches=2)
        return
    if traveling.what == "needed":
        tally.move_rows(int(traveling.sent.max()), groups)
    tally.move_rows(new, groups)


def _put_in_order_before(tally: Tally, traveling: Traveling) -> None:
    """New keys that go into pages after the attention, in order for that; but not own rows that are all that a rank sees."""
    choice, groups, most = tally.choice, tally.choice.problem.overlap, Most.of(tally.choice.plan)
    if traveling.what != "nothing":
        reads_all = traveling.what == "all" or choice.transport == "peer_memory"
        tally.move_rows(choice.plan.num_tokens if reads_all else most.new, groups)
    copy_stored(tally, most.new // groups)


def _rest_into_pages(tally: Tally, traveling: Traveling, seconds: float) -> None:
    """What pages that every rank holds whole get beside or after an attention of so many seconds."""
    choice = tally.choice
    if not traveling.rest:
        return
    # Each rank receives all that others have, and sends as much: what it has less of before comes now. Where one has all before, others
    # have not.
    everything = choice.plan.num_tokens - min(choice.plan.rank_tokens)
    rows = max(0, everything - max(traveling.needed, int(traveling.sent.max()))) or traveling.rest
    tally.gather(rows * choice.problem.key_bytes // choice.problem.overlap, seconds)
    latency = choice.link.latency
    if choice.link.hides_gather:
        tally.exposed -= min(latency, seconds)
    elif traveling.what == "needed":
        # It is read again, and nobody is waited for.
        tally.exposed -= latency
        tally.transfer -= latency


def _collect_into_pages(tally: Tally, traveling: Traveling) -> None:
    """The same into pages that every rank holds whole: what is seen before the attention, and then the rest."""
    choice, groups = tally.choice, tally.choice.problem.overlap
    rows, is_sent_twice = choice.problem.rows, traveling.what == "needed"
    first = choice.plan.num_tokens if traveling.what == "all" else rows + traveling.needed
    if choice.plan.cp_size > 1:
        tally.move_rows(rows, groups)
    if choice.transport == "peer_memory":
        tally.move_rows(rows, groups, launches=3 if is_sent_twice else 2)
        return
    for sent in (traveling.sent, traveling.rest_sent) if is_sent_twice else ():
        tally.move_rows(int(sent.max()), groups)
    tally.move_rows(first, groups)
    tally.move_rows(traveling.rest, groups)
