"""Files anywhere: a path or any fsspec URL (s3://, gs://, http://, memory://)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import UserError


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of ``url`` and the path in it. Raises `UserError` if nothing installed can read such URLs."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {url}: {error}") from None
    return fs, path


@contextlib.contextmanager
def atomic_file(url: str) -> Iterator[str]:
    """A local path to write to, which becomes ``url`` (any fsspec URL) when the block ends, or nothing if it raises."""
    fs, target = locate(url)
    local = isinstance(fs, LocalFileSystem)
    folder = os.path.dirname(target)
    if local:
        os.makedirs(folder, exist_ok=True)
    # beside the target, so that the rename stays on one file system; dot files are no shards
    scratch = tempfile.mkdtemp(prefix=".writing-", dir=folder if local else None)
    try:
        path = os.path.join(scratch, os.path.basename(target))
        yield path
        if local:
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(path, target)
            _sync_folder(folder)
        else:
            fs.put_file(path, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync_folder(folder: str) -> None:
    """Make a rename in ``folder`` survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
