"""List the runs below folders: state, progress, last checkpoint, requeues, and why the last attempt ended.

python tools/runs.py                        those below runs/
python tools/runs.py runs /scratch/me/runs --watch 10
python tools/runs.py runs --json | jq '.[] | select(.state == "failed") | .folder'

Those that need somebody come first. A run is "silent" when its heartbeat, which is written every few seconds, is more
than two minutes old: it was killed, or its node is gone. "stopped" ones go on when they are started again. Links lead
to runs, but not through folders. Of checkpoints in a store the newest is what the run last said, or with --stores what
the store says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from lvdm.errors import UserError, command_line


def main() -> None:
    """Parse, look, print; again and again if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER", help="(runs)")
    parser.add_argument("--stores", action="store_true", help="ask stores for the newest checkpoints there")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again and again, with this pause")
    arguments = parser.parse_args()
    with command_line("runs", ranks=False):
        from lvdm.jobs.fleet import look_at, plain
        from lvdm.jobs.fleet_table import console, show

        if arguments.watch is not None and (arguments.json or arguments.watch <= 0):
            raise UserError("--watch takes a number of seconds above 0, and not together with --json")
        while True:
            runs = look_at(arguments.folders, stores=arguments.stores)
            if arguments.json:
                print(json.dumps([plain(run) for run in runs], indent=1))
            else:
                screen = console()
                if arguments.watch is not None:
                    screen.clear()
                show(screen, runs)
            if arguments.watch is None:
                return
            time.sleep(arguments.watch)


if __name__ == "__main__":
    main()
