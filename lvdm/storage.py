"""Files anywhere: a path or any fsspec URL (s3://, gs://, http://, memory://)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import Requeue, UserError

T = TypeVar("T")
ATTEMPTS = 6
FIRST_PAUSE = 0.2
"""Seconds before the second attempt, doubled for each one after it and jittered by half."""
READ_TIMEOUT = 60.0
"""Seconds after which a read from a store counts as failed."""
UNUSED_DAYS = 30
"""Days after which what nobody used leaves the node's cache."""

_COPY_BLOCK = 32 << 20
_REFUSED = (PermissionError, IsADirectoryError)
_OURS = (TypeError, ValueError, ImportError, NotImplementedError)  # a fault of a call, which no retry mends
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_ABSENT_STATUS = {404, 410}  # of the answers 400 to 499 of a web server
_PASSING_STATUS = {408, 425, 429}
_NEVER_STATUS = {501, 505}  # of those from 500 on


class Missing(UserError):
    """There is no such file or folder."""


def locate(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of ``url`` and the path in it. Raises `UserError` if nothing installed can read such URLs."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open {url}: {error}") from None
    return fs, path


def persistently(
    url: str,
    read: Callable[[AbstractFileSystem, str], T],
    *,
    patient: bool = False,
    ours: tuple[type[Exception], ...] = _OURS,
    doing: str = "read",
) -> T:
    """What ``read`` gives for the file system of ``url`` and the path in it, in several attempts if its store fails.

    Args:
        patient: an attempt at a store may take longer than `READ_TIMEOUT`.
        ours: errors that are faults of the call, and are raised as they are.
        doing: what ``read`` does, for messages.
    Raises:
        Missing: there is no such file or folder.
        UserError: it may not be read.
        Requeue: it could not be read in `ATTEMPTS` attempts.
    """
    fs, path = locate(url)
    patient = patient or isinstance(fs, LocalFileSystem)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            return read(fs, path) if patient else _within(READ_TIMEOUT, lambda: read(fs, path))
        except Exception as error:  # each store's client has error classes of its own
            if _is_absence(error):
                raise Missing(f"cannot {doing} {url}: {type(error).__name__}; was it moved or deleted?") from None
            if isinstance(error, _REFUSED) or _is_refusal(error):
                raise UserError(f"cannot {doing} {url}: {type(error).__name__}: {error}") from None
            if isinstance(error, (UserError, *ours)):
                raise
            last = error.__cause__ if isinstance(error, FileNotFoundError) else error
    raise Requeue(f"cannot {doing} {url} after {ATTEMPTS} attempts: {type(last).__name__}: {last}")


def _is_absence(error: Exception) -> bool:
    """Whether a store says that something is not there; fsspec says so too when a web server does not answer."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return False
    cause = error.__cause__
    of_the_web = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return not of_the_web or _status(error) in _ABSENT_STATUS


def _is_refusal(error: Exception) -> bool:
    """Whether a web server will not answer otherwise."""
    status = _status(error)
    return status in _NEVER_STATUS or (400 <= status < 500 and status not in _PASSING_STATUS)


def _status(error: Exception) -> int:
    """What a web server answered, 0 if unknown."""
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    return status if isinstance(status, int) else 0


def _within(seconds: float, read: Callable[[], T]) -> T:
    """What ``read`` gives, unless it takes longer; then it is left to itself, and its thread dies with the process."""
    answer: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(read())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise OSError(f"no answer within {seconds:g} s") from None


def read_file(url: str) -> bytes:
    """All bytes of ``url`` (a path or any fsspec URL). Raises as `persistently` does."""
    return persistently(url, lambda fs, path: bytes(fs.cat_file(path)))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end``, exclusive. Raises as `persistently` does, and `UserError` if others come."""
    size = end - start

    def read(fs: AbstractFileSystem, path: str) -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=end))
        if len(data) > size:
            raise UserError(f"cannot read {url}: its store does not serve ranges: of {size} bytes {len(data)} came")
        if len(data) < size:
            raise OSError(f"{len(data)} bytes came instead of {size}")
        return data

    return persistently(url, read)


def file_info(url: str) -> tuple[int, str]:
    """Bytes of a file and its `version_tag`. Raises as `persistently` does, and `UserError` if its size is not told."""
    info = persistently(url, lambda fs, path: dict(fs.info(path)))
    if info.get("size") is None:
        raise UserError(f"the store does not say how many bytes {url} has")
    return int(info["size"]), version_tag(info)


@contextlib.contextmanager
def atomic_file(url: str) -> Iterator[str]:
    """A local path to write to, which becomes ``url`` (any fsspec URL) when the block ends, or nothing if it raises.

    Raises:
        UserError: nothing can be written there, or no more.
        Requeue: the store did not take it in `ATTEMPTS` attempts.
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
        scratch = tempfile.mkdtemp(prefix=".writing-", dir=folder if local else _scratch_folder())
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
            persistently(url, lambda fs, place: fs.put_file(path, place), patient=True, doing="write")
    except NotImplementedError:
        raise UserError(f"cannot write {url}: its store takes no files") from None
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise UserError(f"cannot write {url}: {os.strerror(error.errno)}") from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuses_writing(error: Exception) -> bool:
    """Whether a disk said that it takes nothing here, or no more, so that trying again is in vain."""
    return isinstance(error, OSError) and (error.errno in _NO_PLACE or isinstance(error, _REFUSED))


def _scratch_folder() -> Path:
    """Where files on their way to a store are written, without what killed processes left there long ago."""
    folder = cache_folder("writing")
    forget_unused(folder, days=1)
    return folder


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


def note_use(path: Path) -> None:
    """Keep what is in a cache folder from `forget_unused`."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def forget_unused(folder: Path, days: float = UNUSED_DAYS) -> None:
    """Remove what is in a cache folder and was not used for so many days."""
    oldest = time.time() - 86400 * days
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                if max(path.stat().st_atime, path.stat().st_mtime) >= oldest:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def cached_copy(url: str) -> Path:
    """A local copy of a remote file in the node's cache, fetched again when what its store tells of it changes.

    Raises:
        UserError: as `file_info` does.
        Requeue: it cannot be read, or changes while it is.
    """
    told = size, tag = file_info(url)
    copy = cache_folder("files") / hashlib.sha256(f"{url} {size} {tag}".encode()).hexdigest()[:32]
    if not copy.is_file():
        forget_unused(copy.parent)
        with atomic_file(str(copy)) as target:
            with open(target, "wb") as file:
                for start in range(0, size, _COPY_BLOCK):
                    file.write(read_range(url, start, min(start + _COPY_BLOCK, size)))
            if file_info(url) != told:
                raise Requeue(f"{url} changed while it was copied")
    note_use(copy)
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


def append_json(path: Path, *documents: Mapping[str, Any]) -> None:
    """Add a line for each document to a file of lines; a last line that a kill has cut short is ended first."""
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        cut_short = file.read(1) not in (b"\n", b"")
        file.write((("\n" if cut_short else "") + lines).encode())


def place_of_run(place: str, folder: Path, started_as: str) -> str:
    """A place that a run's config names: a URL, or a path, which counts from the folder that the run was started in.

    Args:
        folder: of the run, as it is reached from here.
        started_as: the same, as the config has it; if it does not lead to ``folder``, the working folder counts.
    """
    if "://" in place:
        return place
    parts, here = Path(started_as).parts, folder.resolve().parts
    leads = bool(parts) and not os.path.isabs(started_as) and here[-len(parts) :] == parts
    return str(Path(*here[: -len(parts)], place) if leads else Path(place))


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
