"""A batch as a JSON file: a list of requests, each ``{"prefix_len": 4096, "extend_len": 128}`` or ``[4096, 128]``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpattn.errors import BatchError


def read_batch(path: Path) -> list[tuple[int, int]]:
    """The (prefix_len, extend_len) pairs of a batch file. Other keys of a request, such as a note, are passed over.

    Raises BatchError if the file can not be read or is of another form.
    """
    try:
        requests = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BatchError(f"can not read the batch file {path}: {error.strerror}") from None
    except ValueError as error:
        raise BatchError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(requests, list):
        raise BatchError(
            f'{path} holds a JSON {type(requests).__name__}; a batch file is a list such as [{{"prefix_len": 0, "extend_len": 512}}]'
        )
    return [_pair(request, number, path) for number, request in enumerate(requests)]


def _pair(request: Any, number: int, path: Path) -> tuple[int, int]:
    if isinstance(request, dict):
        missing = {"prefix_len", "extend_len"} - request.keys()
        if missing:
            raise BatchError(f"{path}: request {number} has no {' and no '.join(sorted(missing))}")
        return request["prefix_len"], request["extend_len"]
    if isinstance(request, list) and len(request) == 2:
        return request[0], request[1]
    raise BatchError(f'{path}: request {number} is {request!r}; write {{"prefix_len": 0, "extend_len": 512}} or [0, 512]')
