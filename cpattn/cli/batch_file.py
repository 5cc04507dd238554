"""A batch as it is given on the command line: a JSON file, or the requests themselves as text.

A file holds a list of requests, each ``{"prefix_len": 4096, "extend_len": 128}`` or ``[4096, 128]``. Text holds requests
with commas between them: ``4096+128``, prefix and new tokens; ``128k``, new tokens alone; ``8k+1 x 256``, 256 requests alike.
k is 1,024, and m is 1,024 k.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cpattn.errors import BatchError, shown
from cpattn.metadata.batch import MAX_TOKENS

_LENGTH = r"(\d+) *([km]?)"
_REQUEST = re.compile(rf"\s*(?:{_LENGTH}\s*\+\s*)?{_LENGTH}\s*(?:[x*]\s*(\d+)\s*)?", re.IGNORECASE)
# What has nothing else in it is meant as requests, right or wrong. So is what has a plus, unless a file has that name.
_TEXT = re.compile(r"[\d\s,x*km()]*\d[\d\s,x*km()]*", re.IGNORECASE)
_UNITS = {"": 1, "k": 2**10, "m": 2**20}
_FORM = 'a batch file is a list such as [{"prefix_len": 0, "extend_len": 512}]'
_MOST_DIGITS = 30
_MOST_REQUESTS = 10**6
_EXAMPLE = '"0+512, 4096+128"'
_RULE = 'write prefix+new tokens or new tokens alone, and "x 256" behind it for 256 alike: "4096+128, 16k, 8k+1 x 256"'

# For help texts of options that take a batch.
BATCH_HELP = 'a JSON file, or requests as prefix+new tokens: "0+3670, 4096+128", "128k", "8k+1 x 256"'


def read_batch(given: str) -> list[tuple[int, int]]:
    """The (prefix_len, extend_len) pairs of a batch, from a file of that name or from the text itself.

    >>> read_batch("0+3670, 77+1")
    [(0, 3670), (77, 1)]
    >>> read_batch("128k, 8k+1 x 2")
    [(0, 131072), (8192, 1), (8192, 1)]

    Raises BatchError if it is neither.
    """
    path = Path(given)
    if ("+" in given or _TEXT.fullmatch(given)) and not _is_file(path):
        return _parse_text(given)
    if not given.strip():
        raise BatchError(f"the batch is empty; write requests as prefix+new tokens, such as {_EXAMPLE}, or name a JSON file")
    return read_batch_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a batch may be longer than a file's name can be
        return False


def _parse_text(text: str) -> list[tuple[int, int]]:
    batch: list[tuple[int, int]] = []
    for number, written in enumerate(text.split(",")):
        request, count = _parse_request(written, number)
        if len(batch) + count > _MOST_REQUESTS:
            raise BatchError(f"the batch has {len(batch) + count:,} requests; as text it can have {_MOST_REQUESTS:,} at most")
        batch += [request] * count
    return batch


def _parse_request(written: str, number: int) -> tuple[tuple[int, int], int]:
    """A request, and how many there are of it."""
    match = _REQUEST.fullmatch(written)
    if match is None:
        raise BatchError(f"request {number} of the batch is {shown(written.strip())}; {_RULE}")
    prefix, prefix_unit, new, new_unit, count = match.groups(default="")
    return (_length(prefix or "0", prefix_unit), _length(new, new_unit)), _integer(count or "1")


def _length(digits: str, unit: str) -> int:
    return _integer(digits) * _UNITS[unit.lower()]


def _integer(digits: str) -> int:
    """Digits as an integer, as far as they can be a length: Python reads no more than some thousand of them."""
    if len(digits) > _MOST_DIGITS:
        raise BatchError(f"the batch has a length of {len(digits)} digits, {digits[:9]}...; the limit is {MAX_TOKENS}")
    return int(digits)


def read_batch_file(path: Path) -> list[tuple[int, int]]:
    """The (prefix_len, extend_len) pairs of a batch file. Other keys of a request, such as a note, are passed over.

    Raises BatchError if the file cannot be read or is of another form.
    """
    try:
        # Editors of one system begin a file with a mark that is no part of it.
        requests = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_integer)
    except BatchError:
        raise
    except RecursionError:
        raise BatchError(f"{path} has lists within lists, too deep to read; {_FORM}") from None
    except OSError as error:
        raise BatchError(
            f"cannot read the batch file {path}: {error.strerror}; name a JSON file, or write the requests as {_EXAMPLE}"
        ) from None
    except ValueError as error:
        raise BatchError(f"{path} is not a JSON file: {error}; {_FORM}") from None
    if not isinstance(requests, list):
        raise BatchError(f"{path} holds a JSON {type(requests).__name__}; {_FORM}")
    return [_pair(request, number, path) for number, request in enumerate(requests)]


def _pair(request: Any, number: int, path: Path) -> tuple[int, int]:
    if isinstance(request, dict):
        missing = {"prefix_len", "extend_len"} - request.keys()
        if missing:
            raise BatchError(
                f"{path}: request {number} has no {' and no '.join(sorted(missing))}; "
                'write {"prefix_len": 0, "extend_len": 512} or [0, 512]'
            )
        return request["prefix_len"], request["extend_len"]
    if isinstance(request, list) and len(request) == 2:
        return request[0], request[1]
    raise BatchError(f'{path}: request {number} is {shown(request)}; write {{"prefix_len": 0, "extend_len": 512}} or [0, 512]')
