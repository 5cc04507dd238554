"""A batch as text: what is understood, and what is refused with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

import cpattn
from cpattn.cli.batch_file import read_batch


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("0+3670, 4096+128, 77+1", [(0, 3670), (4096, 128), (77, 1)]),
        ("0+1", [(0, 1)]),
        (" 3 + 0 ,4+5", [(3, 0), (4, 5)]),
        ("131072", [(0, 131072)]),
        ("0+16k", [(0, 16384)]),
        ("128K", [(0, 131072)]),
        ("1m + 2 k", [(2**20, 2048)]),
        ("8k+1 x 3, 5", [(8192, 1)] * 3 + [(0, 5)]),
        ("7x2,0+0*1", [(0, 7), (0, 7), (0, 0)]),
        ("5 x 0", []),
    ],
)
def test_text(text: str, batch: list[tuple[int, int]]) -> None:
    assert read_batch(text) == batch


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0+12, y", "request 1 of the batch is 'y'; write prefix\\+new tokens or new tokens alone, and \"x 256\" behind it for 256 alike"),
        ("0+12,", "request 1 of the batch is ''"),
        ("1+2+3", "request 0 of the batch is '1\\+2\\+3'"),
        ("-1+5", "request 0 of the batch is '-1\\+5'"),
        ("12,", "request 1 of the batch is ''"),
        ("8kk", "request 0 of the batch is '8kk'"),
        ("8 k k", "request 0 of the batch is '8 k k'"),
        ("8k x 2k", "request 0 of the batch is '8k x 2k'"),
        ("256 x (8k+1)", r"request 0 of the batch is '256 x \(8k\+1\)'"),
        ("8 x", "request 0 of the batch is '8 x'"),
        ("1.5k", "cannot read the batch file 1.5k"),
        ("k", 'cannot read the batch file k: No such file or directory; name a JSON file, or write the requests as "0\\+512'),
        ("1 x 600000, 1 x 600000", "the batch has 1,200,000 requests; as text it can have 1,000,000 at most"),
        (" ", "the batch is empty"),
        (".", "cannot read the batch file"),
    ],
)
def test_what_is_no_batch_is_refused(text: str, message: str) -> None:
    with pytest.raises(cpattn.BatchError, match=message):
        read_batch(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "has lists within lists, too deep to read; a batch file is a list such as"),
        ("[[0, " + "9" * 5000 + "]]", "the batch has a length of 5000 digits, 999999999...; the limit is 2147483647"),
        ("[[1e400, 1]]", r"request 0 has prefix_len=inf \(float\), which is not an integer"),
        ("[[[1, 2], [3, 4]]]", r"request 0 has prefix_len=\[1, 2\] \(list\), which is not an integer"),
        ('[["' + "x" * 5000 + '"]]', r"request 0 is \['x+\.\.\.; write"),
        ("{}", "holds a JSON dict; a batch file is a list such as"),
    ],
    ids=["nested", "digits", "infinity", "lists", "long", "dict"],
)
def test_what_is_no_batch_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    path.write_text(content)
    with pytest.raises(cpattn.BatchError, match=message) as raised:
        cpattn.plan(read_batch(str(path)), 2)
    assert len(str(raised.value)) < 600


def test_huge_digits_in_text_are_refused() -> None:
    with pytest.raises(cpattn.BatchError, match=r"a length of 5000 digits, 999999999\.\.\.; the limit is 2147483647"):
        read_batch("0+" + "9" * 5000)


def test_a_file_may_have_a_number_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("12").write_text("[[1, 2]]")
    assert read_batch("12") == [(1, 2)]
    assert read_batch("13") == [(0, 13)]


def test_a_mark_of_an_editor_at_the_begin_of_a_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    path.write_bytes(b"\xef\xbb\xbf[[1, 2]]")
    assert read_batch(str(path)) == [(1, 2)]


def test_a_file_may_have_a_plus_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a+b.json"
    path.write_text('[[1, 2], {"prefix_len": 3, "extend_len": 4, "note": "x"}]')
    assert read_batch(str(path)) == [(1, 2), (3, 4)]
