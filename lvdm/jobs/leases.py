"""Leases on names in an output folder, so that processes that do not talk to each other share its work.

A lease is a small file ``.leases/NAME.json`` with its owner and a beat that a thread of the owner raises every third of
the lease's time. Nobody compares clocks: a lease is expired for an observer who has seen the same content for the whole
time on its own monotonic clock. It is created so that one of several wins where the store can do that (a hard link on a
file system, ``If-None-Match`` on S3); in a store it is read back after a short wait too, for those that ignore the
condition, and so is one that was taken over.

Two workers may still end up on one shard: one that was suspended for longer than its lease wakes up, or two take over
in one moment. That costs time and never correctness, as a shard's bytes are a pure function of its source shard and the
settings (batches never span shards, nothing that is compared holds a time or a host), and each file appears in a single
atomic step with the manifest last. Both write the same files, in whatever order.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from types import TracebackType

from fsspec.implementations.local import LocalFileSystem

from lvdm.errors import Requeue, UserError
from lvdm.storage import Missing, locate, read_file, write_text

log = logging.getLogger(__name__)

FOLDER = ".leases"
_ATTEMPTS = 10
_SETTLE = 0.3  # most seconds between writing to a store and reading back


class Leases:
    """The leases of one process on names in ``folder`` (any fsspec URL), renewed while the block runs.

    Args:
        seconds: how long a lease stays without being renewed. Longer than any pause of a healthy process or store.
    """

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder, self.seconds = f"{folder.rstrip('/')}/{FOLDER}", seconds
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "id": secrets.token_hex(8)}
        self._held: dict[str, bytes] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beat = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_all, daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        fs, root = locate(self.folder)
        if isinstance(fs, LocalFileSystem):
            with contextlib.suppress(OSError):  # others may hold some
                os.rmdir(root)

    def sweep(self) -> None:
        """Remove what dead processes left, when nothing more is to be claimed: all but this process's own leases."""
        fs, root = locate(self.folder)
        fs.invalidate_cache()
        with contextlib.suppress(Exception):  # each store's client has error classes of its own
            for path in fs.ls(root, detail=False):
                if path.rsplit("/", 1)[-1].removesuffix(".json") not in self._held:
                    fs.rm(path, recursive=True)

    def claim(self, name: str) -> bool:
        """Whether this process now has the lease on ``name``: it was free, or had expired. Raises `UserError`."""
        url, mine = self._url(name), self._content()
        if not create(url, mine):
            there = self._read(name)
            before, since = self._seen.get(name, (b"", 0.0))
            if not there or there != before:
                self._seen[name] = (there, time.monotonic())
                return False
            if time.monotonic() - since < self.seconds:
                return False
            _replace(url, mine)
            if not self._stays(name, mine):
                return False
        elif not isinstance(locate(url)[0], LocalFileSystem) and not self._stays(name, mine):
            return False
        self._seen.pop(name, None)
        with self._lock:
            self._held[name] = mine
        return True

    def release(self, name: str) -> None:
        """Give a lease back; nothing happens if another process has it by now."""
        with self._lock:
            mine = self._held.pop(name, None)
            with contextlib.suppress(UserError, Requeue):  # one that cannot be read expires
                if mine is not None and self._read(name) == mine:
                    remove(self._url(name))

    def _stays(self, name: str, mine: bytes) -> bool:
        time.sleep(min(_SETTLE, self.seconds / 10))
        return self._read(name) == mine

    def _renew_all(self) -> None:
        while not self._ended.wait(self.seconds / 3):
            with self._lock:
                for name, before in list(self._held.items()):
                    try:
                        if self._read(name) != before:
                            log.warning("another worker took over %s; both go on, to the same result", name)
                            del self._held[name]
                            continue
                        content = self._content()
                        _replace(self._url(name), content)
                        self._held[name] = content
                    except Exception as error:  # a lease that cannot be renewed costs time alone
                        log.warning("cannot renew the lease on %s: %s", name, error)

    def _content(self) -> bytes:
        self._beat += 1
        return json.dumps({**self._owner, "beat": self._beat}).encode()

    def _read(self, name: str) -> bytes:
        try:
            return read_file(self._url(name))
        except Missing:
            return b""

    def _url(self, name: str) -> str:
        return f"{self.folder}/{name}.json"


def create(url: str, content: bytes) -> bool:
    """Make a file with its content in one step, unless it is there already; whether it was made. Raises `UserError`.

    On a store without conditional writes two may both be told that they made it.
    """
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        return _put_new(url, content)
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):  # another process tidied up
            return _link_new(url, path, content)
    raise UserError(f"cannot write {url}: its folder disappears again and again")


def remove(url: str) -> None:
    """Remove a file; one that is gone is fine, and so is one that cannot be removed: what it is, expires."""
    fs, path = locate(url)
    with contextlib.suppress(Exception):  # each store's client has error classes of its own
        fs.rm_file(path)


def _link_new(url: str, path: str, content: bytes) -> bool:
    folder = os.path.dirname(path)
    scratch = f"{folder}/.new-{secrets.token_hex(8)}"
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            with open(scratch, "xb") as file:
                file.write(content)
            os.link(scratch, path)  # fails if it exists, on NFS too
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if os.path.isfile(folder) else error.strerror or error
        raise UserError(f"cannot write {url}: {reason}") from None
    return True


def _put_new(url: str, content: bytes) -> bool:
    fs, path = locate(url)
    for attempt in range(_ATTEMPTS):
        try:
            fs.pipe_file(path, content, mode="create")
            return True
        except Exception as error:  # clients tell a failed condition in many ways
            last = error
        with contextlib.suppress(Missing):  # whoever was there before gave it back meanwhile
            return read_file(url) == content
        time.sleep(_SETTLE * attempt)
    raise UserError(f"cannot write {url}: {type(last).__name__}: {last}")


def _replace(url: str, content: bytes) -> None:
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        write_text(path, content.decode())
        return
    try:
        fs.pipe_file(path, content)
    except Exception as error:  # each store's client has error classes of its own
        raise Requeue(f"cannot write {url}: {type(error).__name__}: {error}") from None
