"""What an attention kernel is compiled for: one object of constants, which its device code is handed as a whole."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass

# Of this file.
_DIGEST = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()


# Registers of a thread of the four warps that run beside a launch of the kernel for Hopper which leaves room for them, and of a thread of
# that one; and the head dim up to which it can do with those. Wider heads spill.
ROOM_REGISTERS = 32
REGISTERS_WITH_ROOM = 160
MOST_DIM_WITH_ROOM = 128


# In capitals, as device code writes its constants. Frozen, as compiled kernels are found by it; no NamedTuple, which Triton would
# take for a tuple of arguments.
@dataclass(frozen=True)
class AttentionConfig:
    """Of both kernels.

    Attributes:
        NUM_HEADS, GROUP, PACK: query heads; those that share a KV head; and those of them that share a tile.
        D, DV: head dims of q and k, and of v.
        D_PADDED, DV_PADDED: what they are computed in; see :class:`cpattn.kernels.tile_shapes.PaddedDims`.
        BLOCK_N: keys of a block.
        Q_SIGN: what q is multiplied by: the sign of the scale.
        WINDOW, SOFTCAP, SINKS, INTO: whether there is one; INTO: an earlier result, into which this one is merged.
        PAGE_SIZE: 0 if keys lie in no pages.
        STORED: k and v are stored in another dtype than q's; FP8: which fp8 that is.
        SCALED: they have scales; OF_TOKENS: one for each token and head, else one for each head.
    """

    NUM_HEADS: int
    GROUP: int
    PACK: int
    D: int
    DV: int
    D_PADDED: int
    DV_PADDED: int
    BLOCK_N: int
    Q_SIGN: int
    WINDOW: bool
    SOFTCAP: bool
    SINKS: bool
    INTO: bool
    PAGE_SIZE: int
    STORED: bool
    FP8: int
    SCALED: bool
    OF_TOKENS: bool

    def __str__(self) -> str:
        """With what is worked out of the fields here: Triton keeps what it has compiled by this, from one release of cpattn to the next."""
        return f"{self!r} {_DIGEST}"

    @property
    def HEADS(self) -> int:
        """Items of a tile."""
        return self.NUM_HEADS // self.PACK

    @property
    def SKIPS(self) -> bool:
        """Whether queries that see no key are left as they are."""
        return self.INTO and not self.SINKS


@dataclass(frozen=True)
class RaggedConfig(AttentionConfig):
    """Of the Triton kernel.

    Attributes:
        D_TAIL, D_TAIL_PADDED: columns of q and k that are computed apart; 0 if there are none.
        BLOCK_M: rows of a tile.
        TMA: k and v are tensor descriptors.
        V_IN_K: v is k's first columns.
        NATIVE: how fp8 is read; see :mod:`cpattn.kernels.stored_numbers`.
    """

    D_TAIL: int
    D_TAIL_PADDED: int
    BLOCK_M: int
    TMA: bool
    V_IN_K: bool
    NATIVE: bool

    @property
    def D_MAIN(self) -> int:
        """Columns of q and k without the tail."""
        return self.D - self.D_TAIL


@dataclass(frozen=True)
class HopperConfig(AttentionConfig):
    """Of the kernel for Hopper.

    Attributes:
        STAGES: key blocks that shared memory holds.
        Q_TMA: q is a tensor descriptor.
        PAGE_KEYS: keys of a block that lie in one page for certain.
        WAITS: some keys may still be on their way (:mod:`cpattn.kernels.arrivals`).
        ROOM: a multiprocessor's registers are left for four warps of ROOM_REGISTERS, which bring those keys meanwhile.
        PREFIX: the first keys of a range may lie elsewhere (:class:`cpattn.keys.PrefixKeys`); pages are those of them then.
        OWN: the last ones may (:class:`cpattn.keys.OwnRows`).
        RAW: with STORED, of how many blocks shared memory holds the bytes.
        COPIED: with STORED, how many of these are copied at a time: 16, or 8 where rows begin at multiples of those alone.
        CONSUMERS: warpgroups that multiply, 64 rows each.
    """

    STAGES: int
    Q_TMA: bool
    PAGE_KEYS: int
    WAITS: bool
    ROOM: bool
    PREFIX: bool
    OWN: bool
    RAW: int
    COPIED: int
    CONSUMERS: int

    @property
    def HALF(self) -> bool:
        """Whether products are those of fp16: all numbers of fp8 are exact in it, and their scales can wait until after the products.
        With a scale for each token they cannot."""
        return self.FP8 > 0 and not self.OF_TOKENS

    @property
    def PRODUCER_WARPS(self) -> int:
        """Warps that bring key blocks: one lets the memory accelerator copy them, eight convert them, or four where consumers need more
        registers."""
        if not self.STORED:
            return 1
        return 8 if self.DV_PADDED <= 128 else 4

    @property
    def REGISTERS(self) -> list[int]:
        """Of a thread of the second consumer, if there is one, and of the producer. A multiprocessor has 512 for a thread of each group of
        four warps, or 504 with one producer warp, with four or with one consumer, or 480 with room for others; the first consumer's gets
        what is left."""
        if not self.STORED:
            return [224, 32] if self.ROOM else [232, 40]
        if self.CONSUMERS == 1:
            return [128]
        if self.DV_PADDED > 128:
            return [224, 56]
        # What converts to fp16 needs fewer, and consumers more, for a scale of each row. So they do for products of q's dtype: with 184 the
        # compiler lets each product wait for the one before.
        return [200, 56]
