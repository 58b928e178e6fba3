"""One web page of a run, in a single file: curves, samples that play, config, versions, data, where the time went.

python tools/report.py runs/mine                        writes runs/mine/report.html
python tools/report.py runs/mine --samples samples/mine --scores scores.json --out mine.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvdm.errors import command_line


def main() -> None:
    """Parse, write the page, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page (RUN/report.html)")
    parser.add_argument("--samples", type=Path, action="append", default=[], help="folder of tools/sample.py to show")
    parser.add_argument("--scores", type=Path, help="result of tools/evaluate.py --metric shapes")
    parser.add_argument("--curves", type=Path, help="write the first chart, the losses, as a PNG too")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "report.html"
    with command_line("report"):
        from lvdm.jobs.report import write_losses, write_report

        write_report(arguments.run, out, arguments.samples, arguments.scores)
        if arguments.curves:
            write_losses(arguments.run, arguments.curves)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
