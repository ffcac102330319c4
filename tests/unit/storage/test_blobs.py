"""Files are written whole or not at all, and an error on reading never looks like lost data."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from kv_agent.errors import CorruptChunkError, StorageError
from kv_agent.storage import blob_content
from kv_agent.storage import blobs as blobs_module
from kv_agent.storage.blobs import BlobFiles, MissingBlobError
from tests.unit.storage.builders import FINGERPRINT, chain, same_bits, whole


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFiles:
    return BlobFiles(tmp_path)


def content(*lengths: int) -> bytes:
    return blob_content.encode({chunk.key: chunk.kv for chunk in chain(*lengths)}, FINGERPRINT)


def test_a_written_blob_lies_under_its_first_two_characters_and_holds_its_bytes(
    blobs: BlobFiles, tmp_path: Path
) -> None:
    relpath = blobs.write("abcd-1", whole(b"payload"))

    assert relpath == "blobs/ab/abcd-1.safetensors"
    assert (tmp_path / relpath).read_bytes() == b"payload"
    assert {path: file.num_bytes for path, file in blobs.files().items()} == {relpath: 7}


def test_only_the_asked_tensor_is_read(blobs: BlobFiles, tmp_path: Path) -> None:
    first, second = chain(3, 5)
    relpath = blobs.write("ab", whole(content(3, 5)))
    path = tmp_path / relpath
    data = path.read_bytes()
    span = blob_content.find_tensor(
        data[8 : 8 + blob_content.header_bytes(data[:8], len(data))], second.key, len(data)
    )
    path.write_bytes(data[: span.start] + bytes(span.end - span.start) + data[span.end :])

    tensor = blobs.read_chunk(relpath, first.key)

    assert same_bits(tensor, first.kv)
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_returned_tensor_is_the_callers_own(blobs: BlobFiles) -> None:
    (chunk,) = chain(3)
    relpath = blobs.write("ab", whole(content(3)))

    blobs.read_chunk(relpath, chunk.key).zero_()

    assert same_bits(blobs.read_chunk(relpath, chunk.key), chunk.kv)


def test_a_missing_file_is_a_missing_blob(blobs: BlobFiles) -> None:
    blobs.write("ab", whole(content(3)))

    with pytest.raises(MissingBlobError, match=r"blobs/cd/cd\.safetensors"):
        blobs.read_chunk("blobs/cd/cd.safetensors", "key")


def test_a_missing_blob_folder_is_not_a_missing_blob(blobs: BlobFiles, tmp_path: Path) -> None:
    (tmp_path / "blobs").rmdir()
    with pytest.raises(StorageError, match="mounted") as caught:
        blobs.read_chunk("blobs/cd/cd.safetensors", "key")
    assert not isinstance(caught.value, MissingBlobError | CorruptChunkError)


def test_an_absent_tensor_is_corrupt(blobs: BlobFiles) -> None:
    relpath = blobs.write("ab", whole(content(3)))

    with pytest.raises(CorruptChunkError, match="nothing"):
        blobs.read_chunk(relpath, "nothing")


def test_running_out_of_file_descriptors_is_not_lost_data(blobs: BlobFiles, tmp_path: Path) -> None:
    (chunk,) = chain(3)
    relpath = blobs.write("ab", whole(content(3)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(StorageError, match="Too many open files") as caught:
            blobs.read_chunk(relpath, chunk.key)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert type(caught.value) is StorageError
    assert same_bits(blobs.read_chunk(relpath, chunk.key), chunk.kv)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_error_while_reading_is_a_plain_storage_error_and_keeps_the_file(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (chunk,) = chain(3)
    relpath = blobs.write("ab", whole(content(3)))

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(blobs_module, "_read_exactly", fail)
        with pytest.raises(StorageError) as caught:
            blobs.read_chunk(relpath, chunk.key)

    assert type(caught.value) is StorageError
    assert same_bits(blobs.read_chunk(relpath, chunk.key), chunk.kv)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing_behind(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    blobs.write("ab-before", whole(b"old"))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(StorageError, match="No space left"):
            blobs.write("ab-after", whole(b"new"))

    assert {path: file.num_bytes for path, file in blobs.files().items()} == {
        "blobs/ab/ab-before.safetensors": 3
    }


def test_a_full_disk_is_a_storage_error_and_leaves_nothing_behind(blobs: BlobFiles) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # Python ignores SIGXFSZ: EFBIG
    try:
        with pytest.raises(StorageError, match="cannot store"):
            blobs.write("ab", whole(bytes(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert blobs.files() == {}


def test_the_bytes_are_synced_and_then_the_folder_that_names_them(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.write("ab-0", whole(b""))  # makes the folders
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    blobs.write("ab-1", whole(b"payload"))

    assert steps == ["rename", "file", "folder"]


def test_without_fsync_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", None)
    blobs = BlobFiles(tmp_path, "never")

    relpath = blobs.write("ab-1", whole(b"payload"))

    assert (tmp_path / relpath).read_bytes() == b"payload"


def test_a_folder_that_cannot_be_synced_leaves_no_blob_behind(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.write("ab-before", whole(b"old"))
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match="Input/output"):
            blobs.write("ab-after", whole(b"new"))

    assert list(blobs.files()) == ["blobs/ab/ab-before.safetensors"]


def test_a_blob_folder_that_is_gone_is_not_made_anew(blobs: BlobFiles, tmp_path: Path) -> None:
    (tmp_path / "blobs").rmdir()

    with pytest.raises(StorageError, match="mounted") as caught:
        blobs.write("ab", whole(b"payload"))

    assert type(caught.value) is StorageError
    assert list(tmp_path.iterdir()) == []


def test_deleting_twice_is_fine(blobs: BlobFiles) -> None:
    relpath = blobs.write("ab", whole(b"payload"))

    blobs.delete(relpath)
    blobs.delete(relpath)

    assert blobs.files() == {}


@pytest.mark.parametrize(
    "relpath",
    [
        "../secret", "/etc/passwd", "blobs/../../secret", "blobs/ab/../../../secret.safetensors", "", ".",
        "blobs/ab/x.safetensors\n", "blobs/ab/x\0.safetensors", "catalog.sqlite3", "blobs//x.safetensors",
        "blobs/../x.safetensors", "blobs/ab/..safetensors", "blobs/ab/sub/xy.safetensors",
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_blob_folder_is_refused(tmp_path: Path, relpath: str) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    blobs = BlobFiles(tmp_path / "store")

    for use in (lambda: blobs.read_chunk(relpath, "k"), lambda: blobs.delete(relpath)):
        with pytest.raises(CorruptChunkError, match="blob path"):
            use()
    assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize("name", ["", "a", "../x", "a/b", "a.b", "ab\n", "é" * 4, "a" * 201])
def test_a_name_that_is_no_plain_file_name_is_refused(blobs: BlobFiles, name: str) -> None:
    with pytest.raises(StorageError, match="blob name"):
        blobs.write(name, whole(b""))
