"""The file of tuned tile shapes: what goes in comes out, what is wrong is refused, and only GPUs read it."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpattn.errors import CPError
from cpattn.kernels import tile_table
from cpattn.kernels.tile_entry import TileEntry, TileKey, why_not_shapes
from cpattn.kernels.tile_shapes import TileShape, tile_shapes
from cpattn.kernels.tile_table import forget, read_table, shapes_for, store, table_path

KEY = TileKey((9, 0), 128, 128, torch.bfloat16, True, False, "3.6")
SHAPES = (TileShape(128, 64, 8, 3, True, True), TileShape(64, 64, 4, 3, True, True))
ENTRY = TileEntry(SHAPES, "NVIDIA H200", "2.11.0", "2026-01-31", 0.0512)
OTHER = KEY._replace(dtype=torch.float32, specialized=False)
OTHER_ENTRY = ENTRY._replace(shapes=(TileShape(32, 16, 4, 1),))


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 seems to compile for a GPU."""
    monkeypatch.setattr(tile_table, "compiled_triton", lambda: "3.6")


def shapes_here() -> tuple[TileShape, ...]:
    forget()
    return shapes_for(128, 128, torch.bfloat16, (9, 0), specialized=True)


# The file.


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "tiles.json"
    assert read_table(path) == {}
    store(path, KEY, ENTRY)
    assert read_table(path) == {KEY: ENTRY}
    store(path, OTHER, OTHER_ENTRY)
    store(path, KEY, ENTRY._replace(gain=0.1))
    assert read_table(path) == {KEY: ENTRY._replace(gain=0.1), OTHER: OTHER_ENTRY}
    store(path, KEY, None)
    store(path, KEY, None)
    assert read_table(path) == {OTHER: OTHER_ENTRY}
    assert sorted(os.listdir(path.parent)) == [".tiles.json.lock", "tiles.json"]


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    store(path, KEY, ENTRY)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["entries"][0] | {"shapes": None} == {
        "capability": "9.0",
        "head_dim": 128,
        "v_head_dim": 128,
        "dtype": "bfloat16",
        "specialized": True,
        "v_in_k": False,
        "triton": "3.6",
        "cpattn": KEY.cpattn,
        "shapes": None,
        "device": "NVIDIA H200",
        "torch": "2.11.0",
        "date": "2026-01-31",
        "gain": 0.0512,
    }
    assert content["entries"][0]["shapes"][0] == SHAPES[0]._asdict()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    store(path, KEY, ENTRY)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CPError, match=r"can not be written: No space left on device; set CPATTN_TILES to another place"):
        store(path, OTHER, OTHER_ENTRY)
    assert read_table(path) == {KEY: ENTRY}
    assert sorted(os.listdir(tmp_path)) == [".tiles.json.lock", "tiles.json"]


def test_others_may_read_what_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    before = os.umask(0o022)
    try:
        store(path, KEY, ENTRY)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_several_store_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    keys = [KEY._replace(head_dim=8 * n) for n in range(1, 17)]
    threads = [threading.Thread(target=store, args=(path, key, ENTRY)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_table(path)) == set(keys)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "shared.json")
    store(tmp_path / "link.json", KEY, ENTRY)
    assert (tmp_path / "link.json").is_symlink()
    assert read_table(tmp_path / "shared.json") == {KEY: ENTRY}


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda table: table.update(version=2), "version 2, and this cpattn reads 1"),
    "no version": (lambda table: table.pop("version"), "the file lacks version"),
    "another field": (lambda table: table.update(more=1), "the file has 'more', which is unknown"),
    "entries": (lambda table: table.update(entries={}), "entries is {}, not of type list"),
    "entry": (lambda table: table["entries"].append(3), "entry 1: it is int, not an object"),
    "twice": (lambda table: table["entries"].append(table["entries"][0]), "entry 1 is for what an entry before it is for"),
    "no field": (lambda table: table["entries"][0].pop("date"), "entry 0: it lacks date"),
    "unknown field": (lambda table: table["entries"][0].update(window=3), "it has 'window', which is unknown"),
    "capability": (lambda table: table["entries"][0].update(capability="sm90"), "capability 'sm90': it must be such as '9.0'"),
    "dtype": (lambda table: table["entries"][0].update(dtype="int8"), "dtype 'int8': it must be one of float32, bfloat16, float16"),
    "head dim": (lambda table: table["entries"][0].update(head_dim="128"), "head_dim is '128', not of type int"),
    "bool": (lambda table: table["entries"][0].update(specialized=1), "specialized is 1, not of type bool"),
    "gain": (lambda table: table["entries"][0].update(gain="much"), "gain is 'much', not a number"),
    "no shapes": (lambda table: table["entries"][0].update(shapes=[]), r"there must be at least one shape"),
    "shape": (lambda table: table["entries"][0]["shapes"][0].pop("tma"), "a shape lacks tma"),
    "power": (lambda table: table["entries"][0]["shapes"][0].update(num_warps=6), "num_warps=6: it must be a power of two from 1 to 16"),
    "true": (lambda table: table["entries"][0]["shapes"][0].update(num_warps=True), "num_warps is True, not of type int"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = tmp_path / "tiles.json"
    store(path, KEY, ENTRY)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CPError, match=r"the tile table .*tiles\.json is not valid: .*remove it, and run `cpattn tune` again") as caught:
        read_table(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # What somebody has written by hand is not written over.
    with pytest.raises(CPError, match="is not valid"):
        store(path, OTHER, OTHER_ENTRY)
    assert json.loads(path.read_text()) == content


WRONG_SHAPES: dict[str, tuple[tuple[TileShape, ...], TileKey, str]] = {
    "order": (SHAPES[::-1], KEY, "each with fewer rows than the one before"),
    "equal rows": ((SHAPES[0], SHAPES[0]), KEY, "each with fewer rows than the one before"),
    "two block_n": ((SHAPES[0], SHAPES[1]._replace(block_n=128)), KEY, "all shapes must have the same"),
    "32 rows": ((TileShape(32, 64, 2, 2),), KEY, "in half precision it must be at least 64"),
    "48 keys": ((TileShape(64, 48, 4, 2),), KEY, "block_n=48"),
    "8 keys": ((TileShape(64, 8, 4, 2),), KEY, "block_n=8"),
    "no stage": ((TileShape(64, 64, 4, 0),), KEY, "num_stages=0"),
    "split keys": ((TileShape(128, 64, 8, 2), TileShape(64, 64, 8, 2)), KEY, "a warp must have 16 rows"),
    "two in fp32": ((TileShape(64, 16, 4, 2), TileShape(32, 16, 2, 2)), OTHER, "where there are several shapes"),
    "tma on SM80": ((TileShape(64, 64, 4, 2, True),), KEY._replace(capability=(8, 0)), "tma on compute capability 8.0: it needs 9.0"),
    "no such kernel": (SHAPES, KEY._replace(specialized=False), "that kernel needs a Triton that has it"),
    "specialized, no tma": ((SHAPES[0]._replace(tma=False),), KEY, "that kernel needs a Triton that has it, tma"),
    "specialized, 256 rows": ((SHAPES[0]._replace(block_m=256),), KEY, "tiles of 128 or 64 rows"),
    "specialized, wide": (SHAPES, KEY._replace(head_dim=576, v_head_dim=512), "head dims up to 256"),
}


@pytest.mark.parametrize(("shapes", "key", "message"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_shapes_that_break_the_rules(shapes: tuple[TileShape, ...], key: TileKey, message: str) -> None:
    assert message in str(why_not_shapes(shapes, key))
    assert why_not_shapes(SHAPES, KEY) is None


@pytest.mark.parametrize("content", ["{", "", "[" * 100000, "\udcff"], ids=["open", "empty", "deep", "bytes"])
def test_what_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CPError, match="is not JSON: "):
        read_table(path)


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CPError, match=r"can not be read: Is a directory"):
        read_table(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CPError, match=r"can not be read: Not a directory"):
        read_table(tmp_path / "file" / "tiles.json")


# Where it is.


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert table_path() is None  # as tests have it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CPATTN_TILES", "~/mine.json")
    assert table_path() == tmp_path / "mine.json"
    monkeypatch.setenv("CPATTN_TILES", "~nobody-of-that-name/mine.json")
    assert table_path() == Path("~nobody-of-that-name/mine.json")
    monkeypatch.setenv("CPATTN_TILES", "")
    assert table_path() is None
    monkeypatch.delenv("CPATTN_TILES")
    assert table_path() == tmp_path / "cache" / "cpattn" / "tiles.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert table_path() == tmp_path / ".cache" / "cpattn" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table_path() == tmp_path / ".cache" / "cpattn" / "tiles.json"


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CPATTN_TILES")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert table_path() is None


# What the kernel takes.


@pytest.mark.usefixtures("on_gpu")
def test_an_entry_takes_the_defaults_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    default = tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized=True)
    assert default != SHAPES
    monkeypatch.setenv("CPATTN_TILES", str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shapes_here() == default  # no file, no word
        store(path, KEY, ENTRY)
        assert shapes_for(128, 128, torch.bfloat16, (9, 0), specialized=True) == default  # read once a process
        assert shapes_here() == SHAPES
        for other in (
            KEY._replace(capability=(10, 0)),
            KEY._replace(head_dim=64),
            KEY._replace(v_head_dim=64),
            KEY._replace(dtype=torch.float16),
            KEY._replace(specialized=False),
            KEY._replace(v_in_k=True),
        ):
            assert shapes_for(*arguments(other)) == tile_shapes(*arguments(other))
        monkeypatch.setenv("CPATTN_TILES", "")
        assert shapes_here() == default


def arguments(key: TileKey) -> tuple[int, int, torch.dtype, tuple[int, int], bool, bool]:
    return key.head_dim, key.v_head_dim, key.dtype, key.capability, key.specialized, key.v_in_k


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("key", [KEY._replace(triton="3.7"), KEY._replace(cpattn="0.0.1")], ids=["Triton", "cpattn"])
def test_an_entry_holds_for_the_versions_it_was_measured_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: TileKey) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("CPATTN_TILES", str(path))
    store(path, key, ENTRY)
    assert shapes_here() == tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized=True)


@pytest.mark.usefixtures("on_gpu")
def test_a_broken_file_gives_one_warning_and_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text("{")
    monkeypatch.setenv("CPATTN_TILES", str(path))
    with pytest.warns(UserWarning, match=r"the tile table .*tiles\.json is not JSON: .*; the default tile shapes are used") as caught:
        given = [shapes_here(), shapes_for(64, 64, torch.bfloat16, (9, 0))]
    assert len(caught) == 1
    assert given == [tile_shapes(128, 128, torch.bfloat16, (9, 0), True), tile_shapes(64, 64, torch.bfloat16, (9, 0))]


def test_without_a_gpu_no_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broken one would be warned of."""
    path = tmp_path / "tiles.json"
    path.write_text("{")
    monkeypatch.setenv("CPATTN_TILES", str(path))
    default = tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert shapes_here() == default
        # Kernels of a GPU's tensors may be interpreted as well.
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
        assert shapes_here() == default
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    assert tile_table.compiled_triton() == "3.6"
    with pytest.warns(UserWarning, match="is not JSON"):
        shapes_here()
