"""SGLang: its context-parallel prefill over cpattn, as a plugin in the place of its ``zigzag`` strategy.

SGLang finds it by the entry point ``cpattn`` of the group ``sglang.srt.plugins``, wherever both are installed, and so
calls :func:`replace_zigzag` in each of its processes::

    python -m sglang.launch_server --model-path ... --tp 4 --attn-cp-size 4 --enable-prefill-cp --cp-strategy zigzag

A server without ``--enable-prefill-cp``, or with another strategy, runs as it would without cpattn. ``SGLANG_PLUGINS=none`` leaves every
plugin out.
"""

from cpattn.integrations.sglang.interface import KNOWN_RELEASE
from cpattn.integrations.sglang.plugin import replace_zigzag

__all__ = ["KNOWN_RELEASE", "replace_zigzag"]
