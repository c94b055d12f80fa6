"""Files are written as a whole or not at all."""

import errno
import stat

import pytest
from testing_utils import limited_files

from rlora_trl.files.record import AdapterRecord, TaskRecord
from rlora_trl.writing import write_text


def test_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "new.md", "a\r\nb\né")
    assert (tmp_path / "new.md").read_bytes() == "a\r\nb\né".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "new.md"]


def test_permissions_stay(tmp_path):
    (tmp_path / "card.md").write_text("old")
    (tmp_path / "card.md").chmod(0o660)
    write_text(tmp_path / "card.md", "new")
    assert stat.S_IMODE((tmp_path / "card.md").stat().st_mode) == 0o660


def test_link_is_replaced_and_not_written_through(tmp_path):
    """A link in the cache of the Hub leads to a blob, which must keep its contents."""
    (tmp_path / "blob").write_text("blob")
    (tmp_path / "card.md").symlink_to("blob")
    write_text(tmp_path / "card.md", "new")
    assert (tmp_path / "blob").read_text() == "blob" and (tmp_path / "card.md").read_text() == "new"


@pytest.mark.parametrize("size", [0, 5000])
def test_full_disk_changes_nothing(tmp_path, size):
    path = tmp_path / "card.md"
    path.write_text("by hand")
    with limited_files(size), pytest.raises(OSError, match="card.md") as caught:
        write_text(path, "x" * 20_000)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_text() == "by hand" and list(tmp_path.iterdir()) == [path]
    with limited_files(size), pytest.raises(OSError, match="new.md"):
        write_text(tmp_path / "new.md", "x" * 20_000)
    assert list(tmp_path.iterdir()) == [path]


def test_record_on_a_full_disk(tmp_path):
    old, new = AdapterRecord(tasks=[TaskRecord("first")]), AdapterRecord(tasks=[TaskRecord("x" * 500)])
    path = old.save(tmp_path)
    with limited_files(200), pytest.raises(OSError, match=path.name):
        new.save(tmp_path)
    assert AdapterRecord.load(tmp_path) == old and list(tmp_path.iterdir()) == [path]
    new.save(tmp_path)
    assert AdapterRecord.load(tmp_path) == new


def test_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "none" / "card.md", "x")
    assert caught.value.filename == str(tmp_path / "none" / "card.md")
