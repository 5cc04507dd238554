"""What SGLang calls in each of its processes, before anything else there."""

from __future__ import annotations

from typing import Any

from cpattn.integrations.sglang import engine
from cpattn.integrations.sglang.interface import KNOWN_RELEASE, checked_interface
from cpattn.integrations.sglang.strategy import CPAttnStrategy
from cpattn.log import logger

_REPLACED = "sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"
# Of SGLang's prefill backends those that call a strategy in the way that cpattn knows.
_SERVED = ("fa3", "fa4")


def plugin() -> None:
    """The entry point ``cpattn`` of the group ``sglang.srt.plugins``. It raises nothing: a server must start as it would without cpattn."""
    try:
        replace_zigzag()
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        engine.warn("cpattn is not in the place of the zigzag strategy of SGLang %s: %s", engine.release(), what)


def replace_zigzag() -> None:
    """Puts cpattn's strategy in the place of SGLang's ``zigzag`` one, through SGLang's registry of hooks. Nothing else is replaced.

    An installed cpattn does so by itself in each process of SGLang, which goes on with its own strategy where this raises; the line is
    then a warning in its log. A program that runs SGLang's classes itself may call it before ``HookRegistry.apply_hooks``. Servers
    whose prefill backend is neither fa3 nor fa4 keep SGLang's strategy.

    Raises:
        UnsupportedError: this SGLang's classes are not those that cpattn knows; the line says which.
        ImportError: there is no SGLang.
    """
    import sglang  # noqa: F401

    modules = checked_interface(engine.release())
    hooks = modules.hook_registry
    hooks.HookRegistry.register(_REPLACED, strategy_over(modules.zigzag.ZigzagCPStrategy), hooks.HookType.REPLACE)
    logger().info("SGLang %s makes cpattn's zigzag strategy (known of %s)", engine.release(), KNOWN_RELEASE)


def strategy_over(zigzag: type) -> Any:
    """The class for SGLang: its own one, with cpattn's answers before it. It makes SGLang's own for a backend that cpattn does not serve.

    SGLang loads its plugins before it knows its arguments. It makes a strategy when a worker first asks for it, and knows them then.
    """

    def new(cls: Any, *args: Any, **given: Any) -> Any:
        backend = engine.prefill_backend()
        if backend is not None and backend not in _SERVED:
            engine.warn(
                "SGLang's own zigzag strategy stays, as cpattn serves the prefill backends fa3 and fa4, and this server has %s", backend
            )
            return zigzag(*args, **given)
        if backend is not None:
            engine.warn(
                "cpattn is in the place of the zigzag strategy of SGLang %s (SGLANG_PLUGINS=none leaves plugins out)", engine.release()
            )
        return object.__new__(cls)

    names = {"__doc__": CPAttnStrategy.__doc__, "__module__": __name__, "__new__": new}
    return type("CPAttnZigzagStrategy", (CPAttnStrategy, zigzag), names)
