"""A watch on each rank: where nothing moves any more, all ranks print their stacks, say whose fault it is, and end.

A hang takes no exception: a rank that is stopped, a file system that does not answer or a collective that one rank
never enters leaves all others waiting. Each rank therefore has threads of its own for this. One looks at the clock, one
tells the other ranks through the store where they met what this rank does, and one does what the caller wants often.
No thread waits for another's: a store that hangs, because the rank that serves it is stopped, must not silence the
watch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType

import torch

from lvdm.engine.distributed import Ranks, meeting_place
from lvdm.engine.verdict import Beat, blame, silent_ranks
from lvdm.errors import EXIT_STALLED, rank_from_environment

_STDERR = 2
_LOOK = 0.25  # seconds between looks at the clock
_BEAT = 1.0  # seconds between beats: at 512 ranks some 1000 small requests a second to the store's own thread
_GRACE = 5.0  # seconds in which a rank must be heard of before it counts as silent
_SPREAD = 2.5  # seconds until the last rank knows of a stall
_LAST_WORDS = 5.0  # seconds for what the caller does at the end, which may hang too
_PARTING = 2.0  # seconds that the rank with the store waits for the others to leave
_STOPPED = 5.0  # seconds without a look after which this process must have been stopped as a whole
_START = 30.0  # seconds more for the start, however short a step may be
_PATIENCE = 10.0  # seconds for a connection to the store
_WAITING_BELOW = "/torch/distributed/"
_WAITING_IN = ("/deepspeed/", "/lvdm/engine/pulse.py")  # where results of collectives are waited for
_ALARM, _LEFT = "lvdm/watchdog/alarm", "lvdm/watchdog/left"


@dataclass(frozen=True)
class _Work:
    """A piece of work of the main thread."""

    number: int
    name: str
    began: float
    deadline: float
    since: str


class Watchdog:
    """Ends this rank, and with it all others, when it makes no progress; a context manager.

    It speaks on stderr and ends with `EXIT_STALLED`. Behind it stands `faulthandler`, whose thread needs no Python:
    code that keeps the interpreter's lock keeps these threads from running too.
    """

    def __init__(self, limit: float, *, often: Callable[[], None], stalled: Callable[[str], None]) -> None:
        """
        Args:
            limit: seconds between two calls of `progress`.
            often: called every second or so, in a thread.
            stalled: told why, right before the end, on the one rank that speaks for all.
        """
        self._limit, self._often, self._stalled = limit, often, stalled
        self._rank, self._host = rank_from_environment(), socket.gethostname()
        self._over, self._alarm, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._place = "", False
        self._line: _Line | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self._work = _Work(0, "", 0.0, 0.0, "")
        self.progress("the start", extra=_START)
        self._watching = self._start(self._watch)
        self._start(self._do_often)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if not self._alarm.is_set():
                self._over.set()
        if not self._over.is_set():
            # What ended the main thread is most likely another rank that ended of the same stall.
            self._watching.join()  # and never comes back
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(_PARTING + _BEAT)
        self._line = None  # and with it the store, if it is served here

    def join(self, ranks: Ranks) -> None:
        """From now on, ranks tell each other. Before, a stall is told without names."""
        self._rank = ranks.rank
        self.progress("loading", extra=_START)
        if ranks.world > 1:
            self._line = _Line(ranks, self._beat, self._over, self._alarm)
            self._start(self._line.run)

    def progress(self, what: str, step: int = 0, extra: float = 0.0) -> None:
        """Say what this rank does from now on; it may take ``extra`` seconds more than the limit."""
        name = f"step {step}" if what == "step" else f"{what} at step {step}" if step else what
        now, patience = time.monotonic(), self._limit + extra
        # The same again is no new piece: ranks may go through different numbers of validation batches.
        number = self._work.number + (name != self._work.name)
        self._work = _Work(number, name, now, now + patience, time.strftime("%H:%M:%S"))
        # The last resort, late enough for the threads to be first wherever they can run. It can only end with 1.
        faulthandler.dump_traceback_later(1.25 * patience + _GRACE + _SPREAD + _LAST_WORDS, exit=True)

    def _start(self, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def _watch(self) -> None:
        looked, began, pardoned = time.monotonic(), 0.0, 0.0
        while not self._over.wait(_LOOK):
            now, work = time.monotonic(), self._work
            if work.began != began:
                began, pardoned = work.began, 0.0
            if now - looked > _STOPPED:  # a suspended job goes on: that time is not this rank's
                pardoned += now - looked
            looked = now
            told = self._line is not None and self._line.told
            if told or now > work.deadline + pardoned:
                with self._lock:
                    if self._over.is_set():
                        return
                    # Once: ranks that end before this one disturb what its main thread waits for.
                    self._place = _whereabouts(self._main)
                    self._alarm.set()
                self._end(work, told)

    def _end(self, work: _Work, told: bool) -> None:
        waited = f"no progress for {time.monotonic() - work.began:.0f} s in {work.name} (since {work.since})"
        heard = "told by another rank that nothing moves; here " if told else ""
        _say(f"rank {self._rank} on {self._host}: {heard}{waited}")
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        reason, speaks = f"rank {self._rank} on {self._host} hung", True
        if self._line is not None:
            time.sleep(_GRACE)
            reason, speaks = self._line.verdict()
        reason = f"{waited}: {reason}"
        if speaks:
            _say(f"stalled: {reason}")
            parting = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
            parting.start()
            parting.join(_LAST_WORDS)
        if self._line is not None and self._line.served_here:
            time.sleep(_SPREAD)  # others may have begun to listen that much later, and the store ends with this rank
        os._exit(EXIT_STALLED)

    def _last_words(self, reason: str) -> None:
        with contextlib.suppress(Exception):  # nothing may keep the end from coming
            self._stalled(reason)
            sys.stdout.flush()

    def _do_often(self) -> None:
        while not self._over.wait(_BEAT):
            with contextlib.suppress(OSError):  # of a file system that may be back at the next call
                self._often()

    def _beat(self, count: int) -> Beat:
        work = self._work
        return Beat(self._rank, self._host, count, work.number, work.name, work.since, *self._place)


class _Line:
    """What this rank tells all others and hears of them: a key a rank in the store, and one for all that means alarm.

    It has a connection of its own, since a connection serves one request at a time and the training's may wait in one.
    """

    def __init__(
        self, ranks: Ranks, beat: Callable[[int], Beat], over: threading.Event, alarm: threading.Event
    ) -> None:
        self._ranks, self._beat, self._over, self._alarm = ranks, beat, over, alarm
        self._place = meeting_place()
        self.served_here = ranks.is_main and self._place.served_by_rank_0
        """Whether the others lose the store when this rank ends."""
        self.told = False
        """Whether another rank has raised the alarm."""
        self._looks: list[list[Beat | None]] = []

    def verdict(self) -> tuple[str, bool]:
        """Whose fault the stall is, and whether this rank is the one to say so for all."""
        looks = list(self._looks)
        if len(looks) > 1:
            silent = silent_ranks(looks[0], looks[-1])
            answering = [rank for rank in range(self._ranks.world) if rank not in silent]
            return blame(looks[0], looks[-1]), answering[:1] == [self._ranks.rank]
        server = "rank 0" if self._place.served_by_rank_0 else "the store of the launcher"
        return f"no answer from {server} on {self._place.host}; stopped, dead or cut off", True

    def run(self) -> None:
        """Tell and listen until it is over, or the store is gone; a connection that breaks is made anew."""
        while not self._over.is_set():
            try:
                self._run()
            except ConnectionRefusedError:
                return
            except (torch.distributed.DistError, OSError):
                self._over.wait(_BEAT)
            else:
                return

    def _run(self) -> None:
        address, port = self._place.address, self._place.port
        with socket.create_connection((address, port), timeout=_PATIENCE) as tripwire:
            tripwire.setblocking(False)
            store = torch.distributed.TCPStore(
                address, port, timeout=timedelta(seconds=_PATIENCE), wait_for_workers=False
            )
            count = 0
            # Torch prints a page for every request to a store that is gone: the tripwire tells before.
            while _open(tripwire):
                count += 1
                store.set(_key(self._ranks.rank), self._beat(count).dump())
                if self._alarm.is_set():
                    store.set(_ALARM, "")
                    self._looks.append(self._look(store))
                else:
                    self.told = store.check([_ALARM])
                if self._over.wait(_BEAT):
                    self._part(store, tripwire)
                    return

    def _look(self, store: torch.distributed.Store) -> list[Beat | None]:
        """The last beat of each rank."""
        ranks = list(range(self._ranks.world))
        if not store.check([_key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if store.check([_key(rank)])]
        beats = dict(zip(ranks, map(Beat.load, store.multi_get([_key(rank) for rank in ranks])), strict=True))
        return [beats.get(rank) for rank in range(self._ranks.world)]

    def _part(self, store: torch.distributed.Store, tripwire: socket.socket) -> None:
        """Leave, the rank with the store last, so that no request finds it gone."""
        left = 0
        if not self.served_here:
            left = store.add(_LEFT, 1) if _open(tripwire) else 0
        deadline = time.monotonic() + _PARTING
        while self.served_here and left < self._ranks.world - 1 and time.monotonic() < deadline:
            time.sleep(_LOOK / 10)
            left = store.add(_LEFT, 0)


def _key(rank: int) -> str:
    return f"lvdm/watchdog/{rank}"


def _open(connection: socket.socket) -> bool:
    """Whether the other side of a connection, which never sends anything, has not closed it."""
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _whereabouts(thread: int) -> tuple[str, bool]:
    """Innermost line of a thread, and whether it, or one that computes gradients for it, is in a collective."""
    frames = sys._current_frames()
    innermost = frames[thread]
    place = f"{innermost.f_code.co_name} ({_short(innermost.f_code.co_filename)}:{innermost.f_lineno})"
    pythons_own = {known.ident for known in threading.enumerate()}
    computing = [frame for number, frame in frames.items() if number == thread or number not in pythons_own]
    return place, any(_in_collective(frame) for frame in computing)


def _in_collective(innermost: FrameType) -> bool:
    frame: FrameType | None = innermost
    while frame is not None:
        if _WAITING_BELOW in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return any(part in innermost.f_code.co_filename for part in _WAITING_IN)


def _short(path: str) -> str:
    return "/".join(path.split("/")[-3:])


def _say(line: str) -> None:
    """Past Python's own buffers, whose locks the main thread may hold; nobody may be listening any more."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode())
