"""Say what a checkpoint holds, check it, or compare two.

python tools/inspect_checkpoint.py runs/quickstart
python tools/inspect_checkpoint.py runs/quickstart/checkpoints/step-00000500 --norms
python tools/inspect_checkpoint.py s3://bucket/run/checkpoints --verify
python tools/inspect_checkpoint.py runs/one runs/two --tolerance 1e-5

PATH is a run, a folder of checkpoints or one checkpoint, local or an fsspec URL. Of a run or a folder all checkpoints
are listed, and the newest good one is shown. Without --verify damage shows only in what is read: the manifests, the
sizes of files and, with --norms or OTHER, the tensors.

With OTHER the two are compared: parameters by kind, steps, clock and facts. The relative difference of a parameter is
the norm of the difference by the norm of what PATH has; up to --tolerance it counts as the same. Differences in config,
scores and who wrote them are shown and do not count.

Exit codes: 0 all is well, or equal; 1 the two differ; 2 something is damaged, or there is nothing to inspect.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing

from lvdm.errors import UserError, command_line

DIFFERENT = 1


def main() -> None:
    """Parse and print tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="run, folder of checkpoints or one checkpoint; also an fsspec URL")
    parser.add_argument("other", nargs="?", help="another of these, to compare the first with")
    parser.add_argument("--norms", action="store_true", help="norms of every parameter, moment and average")
    parser.add_argument("--verify", action="store_true", help="read every byte, of all checkpoints that are listed")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference that counts as none (0)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args()
    with command_line("inspect_checkpoint"):
        if arguments.other and arguments.norms:
            raise UserError("--norms is of one checkpoint; give PATH alone")
        if not arguments.other and arguments.tolerance:
            raise UserError("--tolerance is for comparing two; give OTHER too")
        compare(arguments) if arguments.other else inspect(arguments)


def inspect(arguments: argparse.Namespace) -> None:
    """Say what PATH holds. Raises `UserError` if anything of it is damaged."""
    from lvdm.jobs import checkpoint_tables as tables
    from lvdm.jobs.inspect_checkpoint import inspect, plain
    from lvdm.jobs.progress import megabytes, progress_line

    with progress_line("reading", "MB", stderr=True) as line:
        found = inspect(arguments.path, with_norms=arguments.norms, verify=arguments.verify, progress=megabytes(line))
    if arguments.json:
        print(json.dumps(plain(found), indent=1))
    else:
        tables.show(tables.console(), found)
    if found.damaged:
        raise UserError(f"in {found.root} {len(found.damaged)} are damaged: {', '.join(found.damaged)}")
    if arguments.verify and not arguments.json:
        print("every byte is as it was written")


def compare(arguments: argparse.Namespace) -> None:
    """Compare the newest good checkpoints of PATH and OTHER; exits with `DIFFERENT` where they differ."""
    from lvdm.jobs import checkpoint_tables as tables
    from lvdm.jobs.compare_checkpoints import compare as difference_of
    from lvdm.jobs.export_source import CheckpointSource
    from lvdm.jobs.inspect_checkpoint import plain, verify_all
    from lvdm.jobs.progress import megabytes, progress_line

    with progress_line("comparing", "MB", stderr=True) as line:
        locations = []
        for path in (arguments.path, arguments.other):
            source = CheckpointSource(path)
            with closing(source.newest()[0]) as checkpoint:
                locations.append(checkpoint.location)
                if arguments.verify:
                    verify_all(checkpoint, megabytes(line))
            for fault in source.faults:
                print(f"passed over a damaged checkpoint: {fault}", file=sys.stderr)
        found = difference_of(*locations, arguments.tolerance, megabytes(line))
    if arguments.json:
        print(json.dumps(plain(found) | {"equal": found.equal}, indent=1))
    else:
        tables.show_difference(tables.console(), found)
    if not found.equal:
        sys.exit(DIFFERENT)


if __name__ == "__main__":
    main()
