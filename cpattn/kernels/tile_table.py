"""The file of tile shapes that ``cpattn tune`` has measured: where it is, what it may hold, reading and writing it.

It is read for kernels that are compiled for a GPU alone, once a process, so that what runs on a CPU or in Triton's
interpreter never depends on a home directory. All ranks of a group need the same file: tiles of another ``block_n`` sum a
query's keys in another order.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cpattn.errors import CPError
from cpattn.kernels.tile_entry import TileEntry, TileKey, entry_from_json, entry_to_json, json_object, typed
from cpattn.kernels.tile_shapes import TileShape, tile_shapes

# Where the file is, instead of in the user's cache; if empty, none is read.
VARIABLE = "CPATTN_TILES"

_FORMAT = 1


def table_path() -> Path | None:
    """Where the file is, or would be; None if it is turned off by an empty CPATTN_TILES."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        # Unlike Path's, this leaves a "~" as it is that leads nowhere.
        return Path(os.path.expanduser(named)) if named else None
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "cpattn" / "tiles.json"
    except RuntimeError:  # there is no home
        return None


def compiled_triton() -> str | None:
    """Triton's version, as "3.6", where it compiles kernels for a GPU; None elsewhere, where no table is read."""
    if not torch.cuda.is_available():
        return None
    try:
        import triton
    except ImportError:
        return None
    return None if triton.knobs.runtime.interpret else ".".join(triton.__version__.split(".")[:2])


@lru_cache
def shapes_for(
    head_dim: int, v_head_dim: int, dtype: torch.dtype, capability: tuple[int, int], specialized: bool = False, v_in_k: bool = False
) -> tuple[TileShape, ...]:
    """The shapes to choose from: what the file has for these arguments and the Triton that runs, else the default ones.

    The arguments are those of :func:`cpattn.kernels.tile_shapes.tile_shapes`, and so are the rules for what it returns.
    """
    triton = compiled_triton()
    tuned = None if triton is None else _read_once().get(TileKey(capability, head_dim, v_head_dim, dtype, specialized, v_in_k, triton))
    return tile_shapes(head_dim, v_head_dim, dtype, capability, specialized, v_in_k) if tuned is None else tuned.shapes


@lru_cache
def _read_once() -> Mapping[TileKey, TileEntry]:
    path = table_path()
    try:
        return {} if path is None else read_table(path)
    except CPError as error:
        warnings.warn(f"{error}; the default tile shapes are used", stacklevel=2)
        return {}


def forget() -> None:
    """Lets this process read the file anew. What has been launched over a batch's rows keeps its shapes."""
    _read_once.cache_clear()
    shapes_for.cache_clear()


def read_table(path: Path) -> dict[TileKey, TileEntry]:
    """The file's entries; none if there is no file. Raises CPError if it can not be read or is not such a table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CPError(f"the tile table {path} can not be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CPError(f"the tile table {path} is not JSON: {error}") from error
    try:
        return _parse(content)
    except CPError as error:
        raise CPError(f"the tile table {path} is not valid: {error}; remove it, and run `cpattn tune` again") from error


def store(path: Path, key: TileKey, entry: TileEntry | None) -> None:
    """Puts the entry in the place of what the file has for the key, or with None takes that out.

    Readers see the file before or after; of several that store at once each waits for the one before. Raises CPError if it
    can not be read or written.
    """
    # Where it is a link, what that leads to is replaced.
    path = path.resolve()
    # What can not be read is refused before anything is written.
    read_table(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            entries = read_table(path)
            entries.pop(key, None)
            if entry is not None:
                entries[key] = entry
            content = {"version": _FORMAT, "entries": [entry_to_json(key, entry) for key, entry in entries.items()]}
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CPError(f"the tile table {path} can not be written: {error.strerror or error}; set {VARIABLE} to another place") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock of a table, where the system has such locks. The file for it stays, as to remove it would be a race."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _parse(content: Any) -> dict[TileKey, TileEntry]:
    table = json_object(content, ("version", "entries"), "the file")
    if table["version"] != _FORMAT:
        raise CPError(f"it has version {table['version']!r}, and this cpattn reads {_FORMAT}")
    entries: dict[TileKey, TileEntry] = {}
    for number, found in enumerate(typed(table["entries"], list, "entries")):
        try:
            key, entry = entry_from_json(found)
        except CPError as error:
            raise CPError(f"entry {number}: {error}") from error
        if key in entries:
            raise CPError(f"entry {number} is for what an entry before it is for")
        entries[key] = entry
    return entries
