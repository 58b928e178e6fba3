"""The process of each node that writes checkpoints while the ranks train on.

A rank hands over a copy of its state in shared memory (a memfd, sent over a Unix socket) and the URL it belongs to. The
writer knows nothing of tensors: it writes the bytes, syncs, reads back and answers with their checksums. It needs no
torch, runs at low priority, and ends with the rank that started it, so that a killed run leaves nobody writing.

    python -m lvdm.checkpoint.node_writer SOCKET OWNER        (process ID of the rank that starts it)
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from lvdm.checkpoint.blocks import write_blocks
from lvdm.checkpoint.manifest import StoredFile
from lvdm.errors import Requeue, UserError
from lvdm.storage import locate, refuses_writing

_NICE = 10
_START_TIMEOUT = 60.0
_LOOK_EVERY = 0.2
_REQUEST_LIMIT = 1 << 16  # bytes
_END = b"\n"


class NodeWriter:
    """A rank's side of its node's writer."""

    def __init__(self, path: str, owner: bool) -> None:
        """Args:
        path: of the socket, the same for all ranks of the node and nobody else.
        owner: whether this rank starts the process, and again when it has died.
        """
        self.path = path
        self._owner = owner
        self._process: subprocess.Popen[bytes] | None = None
        if owner:
            self._start()

    def write(self, url: str, handle: int, size: int) -> StoredFile:
        """Have the first ``size`` bytes of the memory behind ``handle`` written to ``url``.

        Returns:
            The file's entry in the manifest.
        Raises:
            UserError: the disk does not take it, or no more.
            Requeue: the writer died, or a store failed.
        """
        with self._connect() as connection:
            try:
                socket.send_fds(connection, [json.dumps({"url": url, "size": size}).encode() + _END], [handle])
                answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            except OSError:
                answer = b""
        if not answer.endswith(_END):
            raise Requeue(f"cannot write checkpoint file {url}: the process that writes checkpoints died")
        reply = json.loads(answer)
        if "error" in reply:
            raise (Requeue if reply["passing"] else UserError)(f"cannot write checkpoint file {url}: {reply['error']}")
        return StoredFile(size=size, sha256=tuple(reply["sha256"]))

    def close(self) -> None:
        """End the writer, if it is this rank's."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lvdm.checkpoint.node_writer", self.path, str(os.getpid())]
        )

    def _connect(self) -> socket.socket:
        """A connection to the process; a dead one is started again by its owner, and waited for by the others."""
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            if self._owner and (self._process is None or self._process.poll() is not None):
                self._start()
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                time.sleep(0.02)
            else:
                return connection
        raise Requeue(f"the process that writes checkpoints did not start within {_START_TIMEOUT:g} s")


def discard(url: str) -> None:
    """Remove a file that is to be written again, if it is there and can be removed."""
    with contextlib.suppress(Exception):  # each store's client has error classes of its own
        fs, path = locate(url)
        fs.rm_file(path)


def serve(path: str, owner: int) -> None:
    """Answer requests, each in a thread of its own, until the process ``owner``, which started this one, ends."""
    os.nice(_NICE)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # sent to the whole job; the ranks decide
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    while os.getppid() == owner:  # a pipe would be held open by what the owner has forked, such as loaders
        time.sleep(_LOOK_EVERY)
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))  # made for the socket by the owner, which cannot remove it any more
    os._exit(0)  # whatever its threads are at: nobody waits for it any more


def _answer(connection: socket.socket) -> None:
    with connection:
        message, handles, _, _ = socket.recv_fds(connection, _REQUEST_LIMIT, 1)
        try:
            if not handles or not message.endswith(_END):
                return  # of a rank that died
            request = json.loads(message)
            with mmap.mmap(handles[0], request["size"], prot=mmap.PROT_READ) as memory, memoryview(memory) as data:
                answer = _written(request["url"], data)
        finally:
            for handle in handles:
                os.close(handle)
        with contextlib.suppress(OSError):  # the rank is gone
            connection.sendall(json.dumps(answer).encode() + _END)


def _written(url: str, data: memoryview) -> dict[str, object]:
    """What there is to answer. No error leaves, since its traceback would keep the memory from being closed."""
    try:
        return {"sha256": write_blocks(url, data)}
    except UserError as error:
        return {"error": str(error), "passing": False}
    except FileNotFoundError:
        return {"error": "its folder is not there; can all nodes see it, and was it deleted?", "passing": False}
    except Exception as error:  # each store's client has error classes of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return {"error": reason, "passing": not refuses_writing(error)}


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
