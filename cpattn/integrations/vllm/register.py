"""Telling vLLM of the backend."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from cpattn.errors import UnsupportedError

BACKEND = "cpattn.integrations.vllm.custom.CPAttentionBackend"
"""By this name vLLM imports the backend, when ``CUSTOM`` is chosen."""


def register() -> None:
    """Makes cpattn the backend that vLLM's ``--attention-backend CUSTOM`` stands for, in this process.

    An installed cpattn does so by itself in each process of vLLM, through the entry point ``vllm.general_plugins``, unless another
    plugin has taken the name. The backend is imported when it is chosen, and only then looks whether it knows this vLLM.

    Raises:
        UnsupportedError: there is no vLLM, or one whose registry has no ``CUSTOM``.
    """
    try:
        registry = _registry()
        registry.register_backend(registry.AttentionBackendEnum.CUSTOM, BACKEND)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"there is no vLLM here with a backend CUSTOM to register ({type(error).__name__}: {error}); install vllm==0.33.*"
        ) from error


def plugin() -> None:
    """What vLLM calls in each of its processes. It raises nothing: who does not choose ``CUSTOM`` must not notice it."""
    try:
        if not _registry().AttentionBackendEnum.CUSTOM.is_overridden():
            register()
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        # A logger of vLLM's name, as that of cpattn shows nothing there.
        logging.getLogger("vllm.cpattn").warning("cpattn is not registered as vLLM's backend CUSTOM: %s", what)


def _registry() -> Any:
    return import_module("vllm.v1.attention.backends.registry")
