"""Rotations that depend on how long a sequence is: a rank sees a part of it alone, and a batch has several."""

from __future__ import annotations

from typing import Any

from cpattn.errors import UnsupportedError


def check_rotation(config: Any, longest: int) -> None:
    """Refuses a batch that makes a model choose its frequencies by the largest position that it sees.

    Args:
        config: of the decoder.
        longest: tokens of the longest sequence.

    Raises:
        UnsupportedError: the rope type is ``"dynamic"`` or ``"longrope"``, and a sequence is longer than those that it was made for.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    by_layers = [each for each in parameters.values() if isinstance(each, dict)]
    for rope in [parameters, *by_layers]:
        if rope.get("rope_type") not in ("dynamic", "longrope"):
            continue
        is_long = rope["rope_type"] == "longrope"
        limit = rope["original_max_position_embeddings"] if is_long else config.max_position_embeddings
        if longest > limit:
            raise UnsupportedError(
                f"a sequence has {longest} tokens, and the model's rope type {rope['rope_type']!r} takes other frequencies beyond {limit}, "
                "by the largest position among the rows that it sees. Those are one rank's, of several requests, so that ranks would "
                f"rotate differently; keep sequences to {limit} tokens, or give the model another rope type, such as 'yarn'"
            )
