"""Kill runs hundreds of times at seeded moments, let them go on, and compare each with a straight run, bit for bit.

    PYTHONPATH=. python tools/bench/chaos.py --kills 300

What is killed and when is told in `tests/train/chaos.py`; the suite does the same twenty times. Prints a table and
writes it, dated, into ``tools/bench/results``. Exit code 1 if any run ended otherwise than the straight one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from result import RESULTS, table, write_result

from tests.conftest import make_toy
from tests.ranks import start_server
from tests.train import chaos

_MEANING = {
    "start": "a rank, before its first step",
    "step": "a rank, at a random moment of a random step",
    "save": "a rank, while a checkpoint is being written",
    "publish": "the main rank, at one of its file operations: finding, publishing, deleting checkpoints",
    "writer": "the process that writes, once (the run survives) or at its second attempt too",
}


def main() -> None:
    """Torment runs, print and write down what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="how many kills are to happen")
    parser.add_argument("--seed", type=int, default=1, help="decides what is killed and when")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    given = parser.parse_args()
    start_server()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "toy").mkdir()
        toy = make_toy(Path(scratch) / "toy")
        runs = Path(scratch) / "runs"
        runs.mkdir()
        result = chaos.torment(toy.diffusion, runs, given.seed, given.kills)
    lines = [
        f"{result.runs} runs of {chaos.STEPS} steps on {chaos.WORLD} ranks (ZeRO-2, fp32), a checkpoint every 2 steps, "
        f"were started {result.starts} times and met {result.kills} SIGKILLs in {time.monotonic() - began:.0f} s "
        f"(seed {given.seed}). After each one, the newest checkpoint was read whole.",
        "",
        *table(
            ("killed", "moment", "times"),
            [(way, _MEANING[way], str(result.by_way[way])) for way in chaos.WAYS],
        ),
        "",
        "Compared with the straight run: weights, both moments and averages of every parameter bit for bit, and "
        "position and checksum of every sample of every step, so that none is lost and none seen twice.",
        "",
        f"**Differences: {len(result.differences) or 'none'}.** {'; '.join(result.differences[:20])}".rstrip(),
    ]
    path = write_result(given.out, "chaos", "Runs that are killed and go on", ("torch", "deepspeed"), lines)
    print(f"written to {path}")
    raise SystemExit(bool(result.differences))


if __name__ == "__main__":
    main()
