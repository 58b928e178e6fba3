"""Whose fault a stall is, from what the ranks tell of themselves. Pure: nothing here knows threads or sockets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

_LISTED = 8
"""Ranks of a host that are listed one by one."""


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself, again and again."""

    rank: int
    host: str
    count: int
    """Beats so far; it stands still where the process is stopped, dead, cut off, or unable to run its threads."""
    calls: int
    """Pieces of work that the rank has begun; all ranks begin the same ones in the same order."""
    doing: str
    """The piece under way, such as ``step 812``."""
    since: str
    """Time at which it began, by the clock of ``host``."""
    place: str = ""
    """Innermost line of the main thread, as ``function (file:line)``; told once there is a stall."""
    waits: bool = False
    """Whether the rank is inside a collective, where it can do nothing but wait for the others."""

    def dump(self) -> str:
        """As text for the store; `load` reads it."""
        return json.dumps(astuple(self))

    @classmethod
    def load(cls, text: str | bytes) -> Beat:
        """What `dump` wrote."""
        return cls(*json.loads(text))


def silent_ranks(first: Sequence[Beat | None], last: Sequence[Beat | None]) -> list[int]:
    """Ranks that told nothing new between two looks, seconds apart; none there means never heard of."""
    pairs = enumerate(zip(first, last, strict=True))
    return [rank for rank, (a, b) in pairs if b is None or (a is not None and a.count == b.count)]


def blame(first: Sequence[Beat | None], last: Sequence[Beat | None]) -> str:
    """One sentence on whose fault the stall is, from two looks at all ranks' beats, in rank order.

    Silent ranks come first, since all others may be waiting for them; then ranks that have begun fewer pieces of work;
    then ranks that compute, or wait for something else, while others are inside a collective; then ranks that are not
    where most are.
    """
    silent = silent_ranks(first, last)
    if silent:
        return f"{_said(last, silent)}; stopped, dead or cut off"
    beats = [beat for beat in last if beat is not None]
    suspects = [beat for beat in beats if beat.calls == min(beat.calls for beat in beats)]
    free = [beat for beat in suspects if not beat.waits]
    if len(suspects) < len(beats):
        return f"{_named(free or suspects)} behind the others: {_whereabouts((free or suspects)[0])}"
    if 0 < len(free) < len(beats):
        return f"{_named(free)} not in the collective in which the others wait: {_whereabouts(free[0])}"
    place, most = Counter(beat.place for beat in beats).most_common(1)[0]
    odd = [beat for beat in beats if beat.place != place]
    if odd and 2 * most > len(beats):
        return f"{_named(odd)} not where the others are, {place}: {_whereabouts(odd[0])}"
    return f"all ranks answer, and none is behind; rank 0 on {beats[0].host} is in {_whereabouts(beats[0])}"


def listed(ranks: Sequence[int], most: int) -> str:
    """The first ``most`` of ``ranks``, and how many more there are."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return ", ".join(map(str, ranks[:most])) + more


def _said(last: Sequence[Beat | None], ranks: Sequence[int]) -> str:
    known = [beat for rank in ranks if (beat := last[rank]) is not None]
    said = []
    if known:
        said.append(f"no answer from {_hosts(known)} (last heard of in {known[0].doing} since {known[0].since})")
    never = [rank for rank in ranks if last[rank] is None]
    if never:
        said.append(f"no word ever from {_numbered(never)}")
    return ", ".join(said)


def _named(beats: Sequence[Beat]) -> str:
    return f"{_hosts(beats)} {'is' if len(beats) == 1 else 'are'}"


def _hosts(beats: Sequence[Beat]) -> str:
    hosts: dict[str, list[int]] = {}
    for beat in beats:
        hosts.setdefault(beat.host, []).append(beat.rank)
    return ", ".join(f"{_numbered(ranks)} on {host}" for host, ranks in hosts.items())


def _numbered(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {listed(ranks, _LISTED)}"


def _whereabouts(beat: Beat) -> str:
    return f"{beat.doing} since {beat.since}, at {beat.place}"
