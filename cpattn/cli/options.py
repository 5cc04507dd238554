"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import cpattn
from cpattn.cli.batch_file import BATCH_HELP, read_batch
from cpattn.cli.traffic import Shape
from cpattn.errors import CPError, HeadCountError, PlanError, shown
from cpattn.metadata.auto_partition import AUTO
from cpattn.metadata.partition import PARTITIONS, REMAINDERS
from cpattn.metadata.striped import Striped

# The ranks of commands that are given no number of them.
CP_SIZE = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_RANKS = 4096
_LARGEST_SIZE = 2**20


def add_plan_options(parser: argparse.ArgumentParser, *, several_partitions: bool = False) -> None:
    """--batch, --cp and what else a plan is made of; with ``several_partitions``, --partition takes a list of them."""
    parser.add_argument("--batch", required=True, metavar="BATCH", help=BATCH_HELP)
    parser.add_argument("--cp", type=int, default=CP_SIZE, metavar="N", help=f"number of ranks (default: {CP_SIZE})")
    if several_partitions:
        parser.add_argument(
            "--partition", choices=list(PARTITIONS), nargs="+", help="who owns which tokens (default: all that go with --remainder)"
        )
    else:
        choices = [*PARTITIONS, AUTO]
        parser.add_argument("--partition", choices=choices, default="zigzag", help="who owns which tokens (default: zigzag)")
    parser.add_argument(
        "--remainder",
        choices=REMAINDERS,
        default="balanced",
        help="where tokens go that zigzag or contiguous leave over (default: balanced)",
    )
    parser.add_argument("--pad-to", type=int, default=1, metavar="N", help="round the rows of a rank up to a multiple of this (default: 1)")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--owner",
        type=owner_from,
        metavar="RULE",
        help="a sharded cache whose tokens lie on ranks by their position: striped, or striped:N with N neighbours on a rank in turn",
    )
    cache.add_argument(
        "--sharded", action="store_true", help="a sharded cache: each rank keeps what it computes, and has an even share of each prefix"
    )


def plan_from(
    options: argparse.Namespace, problem: cpattn.Problem | None = None, machine: str | None = None, token_cost: int | None = None
) -> cpattn.Plan:
    """The plan that those options ask for; problem, machine and token_cost are what ``auto`` goes by. Raises BatchError or PlanError."""
    batch = read_batch(options.batch)
    check_cp_size(options.cp)
    if options.partition != AUTO:
        problem = machine = None
    return cpattn.plan(
        batch,
        options.cp,
        partition=options.partition,
        remainder=options.remainder,
        pad_to=options.pad_to,
        problem=problem,
        machine=machine,
        token_cost=token_cost,
        **cache_from(options, batch),
    )


def owner_from(text: str) -> Striped:
    """
    >>> owner_from("striped"), owner_from("striped:16")
    (Striped(interleave=1), Striped(interleave=16))
    """
    name, colon, interleave = text.partition(":")
    if name != "striped" or (colon and not interleave.isdecimal()):
        raise argparse.ArgumentTypeError(f"invalid rule: {shown(text)}; pass striped, or striped:N with the neighbours on a rank in turn")
    try:
        return Striped(int(interleave)) if colon else Striped()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cache_from(options: argparse.Namespace, batch: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How caches are sharded, as arguments of :func:`cpattn.plan`; none where each rank has all."""
    if options.owner is not None:
        return {"owner": options.owner}
    if not options.sharded:
        return {}
    prefix_lens = np.array([request[0] for request in batch], dtype=np.int64)
    # The tokens left over, to the first ranks. The plan refuses a number of ranks that is none.
    return {"prefix_shards": Striped().held(prefix_lens, max(1, options.cp))}


def check_cp_size(cp_size: int) -> None:
    """Raises PlanError for more ranks than can be printed, a line each."""
    if cp_size > _MOST_RANKS:
        raise PlanError(f"--cp {shown(cp_size)}: it can be {_MOST_RANKS:,} at most on the command line; cpattn.plan in Python takes more")


class Heads(NamedTuple):
    """What ``--heads`` was given: query heads, and key/value heads where those stand after a slash."""

    q: int
    kv: int | None = None


def heads_from(text: str) -> Heads:
    """
    >>> heads_from("32/8"), heads_from("32")
    (Heads(q=32, kv=8), Heads(q=32, kv=None))
    """
    q, slash, kv = text.partition("/")
    try:
        return Heads(int(q), int(kv) if slash else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value: {shown(text)}; pass query heads, or query and key/value heads: 32/8") from None


def add_shape_options(
    parser: argparse._ActionsContainer, *, heads: int | None, head_dim: int | None, dtype: str | None = "bfloat16"
) -> None:
    """--heads, --kv-heads, --head-dim, --v-head-dim and --dtype; with None the command has defaults of its own."""
    q_heads = None if heads is None else Heads(heads)
    said = ["" if default is None else f" (default: {default})" for default in (heads, head_dim, dtype)]
    parser.add_argument(
        "--heads", type=heads_from, default=q_heads, metavar="N", help=f"query heads, or query and key/value heads: 32/8{said[0]}"
    )
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: a quarter of the query heads, at least 1)")
    parser.add_argument("--head-dim", type=int, default=head_dim, metavar="N", help=f"size of a head{said[1]}")
    parser.add_argument("--v-head-dim", type=int, metavar="N", help="size of a head of v (default: that of --head-dim)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=dtype, help=f"dtype of q, k and v{said[2]}")


def shape_from(options: argparse.Namespace) -> Shape:
    """The sizes that those options ask for. Raises HeadCountError or CPError."""
    heads, kv_heads = options.heads
    if None not in (kv_heads, options.kv_heads):
        raise HeadCountError(
            f"--heads {shown(heads)}/{shown(kv_heads)} --kv-heads {shown(options.kv_heads)}: give key/value heads only once"
        )
    kv_heads = options.kv_heads if kv_heads is None else kv_heads
    latent_dim: int | None = getattr(options, "latent_dim", None)
    if kv_heads is None and latent_dim is not None:
        kv_heads = heads
    if kv_heads is None:
        kv_heads = heads // 4 if heads % 4 == 0 else 1
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise HeadCountError(
            f"--heads {shown(heads)} --kv-heads {shown(kv_heads)}: query heads must be a multiple of key/value heads, both at least 1"
        )
    v_head_dim = options.head_dim if options.v_head_dim is None else options.v_head_dim
    for name, value in (("--heads", heads), ("--head-dim", options.head_dim), ("--v-head-dim", v_head_dim)):
        if value < 1:
            raise CPError(f"{name} {value}: it must be at least 1")
        if value > _LARGEST_SIZE:
            raise CPError(f"{name} {shown(value)}: it can be {_LARGEST_SIZE:,} at most")
    if latent_dim is not None and (not 1 <= latent_dim <= _LARGEST_SIZE or kv_heads != heads):
        raise CPError(
            f"--latent-dim {shown(latent_dim)} with {kv_heads} key/value heads for {heads} query heads: it is from 1 to {_LARGEST_SIZE:,}, "
            "and expanded for each query head; leave --kv-heads out"
        )
    return Shape(heads, kv_heads, options.head_dim, v_head_dim, options.dtype, DTYPES[options.dtype].itemsize, latent_dim)
