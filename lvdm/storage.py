"""Files anywhere: a path or any fsspec URL (s3://, gs://, http://, memory://)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """A local path to write to, which becomes ``url`` (any fsspec URL) when the block ends, or nothing if it raises.

    Raises:
        UserError: nothing can be written there.
    """
    fs, target = locate(url)
    local = isinstance(fs, LocalFileSystem)
    folder = os.path.dirname(target)
    try:
        if local:
            os.makedirs(folder, exist_ok=True)
            if os.path.isdir(target):
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
        # beside the target, so that the rename stays on one file system; dot files are no shards
        scratch = tempfile.mkdtemp(prefix=".writing-", dir=folder if local else None)
    except OSError as error:
        raise UserError(f"cannot write {url}: {error.strerror}") from None
    try:
        path = os.path.join(scratch, os.path.basename(target))
        yield path
        if local:
            sync(path)
            os.replace(path, target)
            sync(folder)
        else:
            fs.put_file(path, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends, or nothing if it raises.

    Raises:
        UserError: ``folder`` exists, or cannot be made.
    """
    if folder.exists():
        raise UserError(f"{folder} already exists; name another output folder or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's is private
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """A folder at any fsspec URL as a local one: itself, or a copy that is removed when the block ends.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    fs, root = locate(url)
    if isinstance(fs, LocalFileSystem):
        yield Path(root if "://" in url else url)
        return
    with tempfile.TemporaryDirectory(prefix="lvdm-") as scratch:
        try:
            for path in fs.find(root):
                target = (Path(scratch) / os.path.relpath(path, root)).resolve()
                if not target.is_relative_to(Path(scratch).resolve()):
                    raise UserError(f"{url} lists {path}, which lies outside of it")
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(path, str(target))
        except UserError:
            raise
        except Exception as error:  # each store's client has error classes of its own
            raise UserError(f"cannot read {url}: {type(error).__name__}: {error}") from None
        if not any(Path(scratch).iterdir()):
            raise UserError(f"there is no folder {url}")
        yield Path(scratch)


def cache_folder(name: str) -> Path:
    """A folder of this user for what can be made again, on this node: in ``$LVDM_CACHE``, or in the temporary folder.

    Raises:
        UserError: it cannot be made, or is somebody else's.
    """
    root = Path(os.environ.get("LVDM_CACHE") or Path(tempfile.gettempdir()) / f"lvdm-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid():
            raise UserError(f"the cache folder {root} belongs to another user; set LVDM_CACHE to one of yours")
        (root / name).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {root}: {error.strerror}; set LVDM_CACHE to another") from None
    return root / name


def cached_copy(url: str) -> Path:
    """A local copy of a remote file in the node's cache, fetched again when what its store tells of it changes.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
    """
    fs, path = locate(url)
    info = fs.info(path)
    name = hashlib.sha256(f"{url} {info.get('size')} {version_tag(info)}".encode()).hexdigest()[:32]
    copy = cache_folder("files") / name
    if not copy.is_file():
        with atomic_file(str(copy)) as target:
            fs.get_file(path, target)
    return copy


def version_tag(info: Mapping[str, Any]) -> str:
    """What a store tells of a file that changes with its content: name and value of an ETag or a time, or nothing."""
    for name in ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created"):
        if info.get(name):
            return f"{name.lower()}:{str(info[name]).strip(chr(34))}"
    return ""


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by ``text`` so that a reader or a crash sees the old content or the new, never a part."""
    with atomic_file(str(path)) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_json(path: str | Path, document: Mapping[str, Any]) -> None:
    """A JSON file, replaced whole as by `write_text`."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A mapping in a JSON file. Raises `UserError`."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping")
    return tree


def sha256_of(*paths: str | Path) -> str:
    """SHA-256, in hex, of the bytes of local files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def sync(path: str | Path) -> None:
    """Make a local file's content, or the renames in a folder, survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
