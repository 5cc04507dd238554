"""The current forward pass: what calls without metadata of their own belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from cpattn.call import checks
from cpattn.call.arguments import Arguments, BackendChoice, StrategyChoice
from cpattn.errors import CPError
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.transports.groups import Group


@dataclass(eq=False)
class ForwardContext:
    """What :func:`forward_context` was given, and how many calls have used it so far.

    Attributes:
        meta, group, strategy, backend, check: as given.
        calls: of ``cp_attention`` and ``attend`` that have returned.
    """

    meta: CPMetadata
    group: Group
    strategy: StrategyChoice
    backend: BackendChoice
    check: bool
    calls: int = 0

    def complete(self, arguments: Arguments) -> Arguments:
        """With the strategy and the backend of the context, where the call leaves the choice open."""
        if arguments.k is not None and _is_auto(arguments.strategy) and not _is_auto(self.strategy):
            arguments = arguments._replace(strategy=self.strategy)
        if _is_auto(arguments.backend) and not _is_auto(self.backend):
            arguments = arguments._replace(backend=self.backend)
        return arguments


_current: ContextVar[ForwardContext | None] = ContextVar("cpattn forward_context", default=None)


@contextmanager
def forward_context(
    meta: CPMetadata,
    *,
    group: Group = None,
    strategy: StrategyChoice = "auto",
    backend: BackendChoice = "auto",
    check: bool = False,
) -> Iterator[ForwardContext]:
    """Within it ``cp_attention(q, k, v, None)`` and ``attend(q, kv_cache, None)`` are about this batch. A model then needs no
    metadata to be handed from layer to layer, and an exported one can run any batch.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 5)], cp_size=1, cp_rank=0)
    >>> q = torch.randn(5, 2, 8)
    >>> with cpattn.forward_context(meta):
    ...     out = cpattn.cp_attention(q, q, q, None)
    >>> torch.equal(out, cpattn.cp_attention(q, q, q, meta))
    True

    It holds for this thread (or task). Contexts can be nested; the innermost holds. ``torch.utils.checkpoint`` in a compiled graph makes
    the calls again in the backward pass: run that within the context as well.

    Args:
        meta: this rank's metadata.
        group, strategy, backend, check: as in :func:`cpattn.cp_attention`, for calls that leave them open. A compiled graph can hold
            strategies and backends by name alone: one of your own is given here.

    Yields:
        The context, whose ``calls`` says how many calls have used it.

    Raises:
        CPError: meta is no CPMetadata.
    """
    checks.check_metadata(meta)
    with entered(ForwardContext(meta, group, strategy, backend, check)) as context:
        yield context


@contextmanager
def entered(context: ForwardContext) -> Iterator[ForwardContext]:
    """Makes a context that of this thread."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


def current_context() -> ForwardContext:
    """That of this thread. Raises CPError where there is none."""
    context = _current.get()
    if context is None:
        raise CPError("meta is None, but there is no forward_context here; pass this rank's metadata, or call the model within one")
    return context


def _is_auto(choice: object) -> bool:
    return isinstance(choice, str) and choice == "auto"
