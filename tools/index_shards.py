"""Index folders of webdataset shards, which training needs: python tools/index_shards.py FOLDER [FOLDER ...]

Shards of video2dataset, img2dataset and plain webdataset, on disk or in any store that fsspec knows. Bytes are not
copied: headers and ``.json`` members are read, several shards at a time. A build that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lvdm.errors import command_line


def main() -> None:
    """Index each folder with a progress bar, and say what is in it and what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of *.tar, or any fsspec URL of one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument(
        "--exclude", type=Path, metavar="JSONL", help="leave out the samples of this list, such as RUN/replaced.jsonl"
    )
    arguments = parser.parse_args()
    with command_line("index_shards"):
        from lvdm.data.build_index import build_index, read_exclusions
        from lvdm.jobs.progress import progress_line

        exclude = read_exclusions(arguments.exclude) if arguments.exclude else {}
        entries = left = sum(map(len, exclude.values()))
        for folder in arguments.folders:
            with progress_line(f"indexing {folder}", "shards") as progress:
                built = build_index(folder, workers=arguments.workers, exclude=exclude, progress=progress)
            left_out = "".join(f"; {count} left out: {reason}" for reason, count in sorted(built.left_out.items()))
            print(f"{folder}: {built.samples} samples in {built.shards} shards{left_out}")
            left -= entries - built.unmatched
        if left > 0:
            print(f"{left} of the {entries} entries of {arguments.exclude} are no samples of what was indexed")


if __name__ == "__main__":
    main()
