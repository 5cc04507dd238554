"""What SGLang calls in each of its processes, before anything else there."""

from __future__ import annotations

from typing import Any

from cpattn.integrations.sglang.interface import KNOWN_RELEASE, check_interface
from cpattn.integrations.sglang.strategy import CPAttnStrategy
from cpattn.log import logger

_REPLACED = "sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"


def replace_zigzag() -> None:
    """Puts cpattn's strategy in the place of SGLang's ``zigzag`` one, through SGLang's registry of hooks. Nothing else is replaced.

    SGLang calls it, as the entry point ``cpattn`` of the group ``sglang.srt.plugins``; a program that runs SGLang's classes itself may
    call it before ``HookRegistry.apply_hooks``.

    Raises:
        UnsupportedError: this SGLang's classes are not those that cpattn knows; the line says which. SGLang logs it, and goes on with its
            own strategy.
        ImportError: there is no SGLang.
    """
    import sglang
    from sglang.srt.layers.cp import zigzag
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    release = str(getattr(sglang, "__version__", "without a version"))
    check_interface(zigzag, memory_pool, release)
    HookRegistry.register(_REPLACED, strategy_over(zigzag.ZigzagCPStrategy), HookType.REPLACE)
    logger().info("cpattn is in the place of the zigzag strategy of SGLang %s (known of %s)", release, KNOWN_RELEASE)


def strategy_over(zigzag: type) -> Any:
    """The class for SGLang: its own one, with cpattn's answers before it."""
    return type("CPAttnZigzagStrategy", (CPAttnStrategy, zigzag), {"__doc__": CPAttnStrategy.__doc__, "__module__": __name__})
