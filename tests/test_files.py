"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from zemosaic.files import part_of, whole_file, write_whole


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_and_replaced(tmp_path, durable):
    path = tmp_path / "a.txt"
    for content in (b"one", b""):
        write_whole(path, content, durable=durable)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_must_last_is_forced_to_the_disk(tmp_path, monkeypatch):
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", forced.append)
    write_whole(tmp_path / "picture", b"x")
    assert not forced
    write_whole(tmp_path / "report", b"x", durable=True)
    assert len(forced) == 1


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as part:
        part.write_text("new")
        assert part == part_of(path) and path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_cannot_be_had_is_told(tmp_path):
    taken = tmp_path / "folder"
    (taken / "within").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(taken, b"x")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "a.txt", b"x")
    assert list(tmp_path.iterdir()) == [taken]


def test_another_name_may_be_asked_for(tmp_path):
    with whole_file(tmp_path / "a.results", tmp_path / "a.7.part") as part:
        part.write_text("x")
        assert part.name == "a.7.part"
    assert [path.name for path in tmp_path.iterdir()] == ["a.results"]
