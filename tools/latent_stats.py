"""Mean and standard deviation of latents by channel, and the scale and shift that they ask for.

python tools/latent_stats.py data/films/latents
python tools/latent_stats.py data/films/latents s3://bucket/clips/latents --per channel --write

Folders that are trained on together need one scale and shift, which is taken from all their latents. What the encoding
job noted of its shards is used; --read reads the latents themselves. Nothing is changed without --write.
"""

from __future__ import annotations

import argparse
import functools
import math
from typing import TYPE_CHECKING

from lvdm.errors import command_line

if TYPE_CHECKING:
    from lvdm.jobs.latent_stats import ChannelSums


def main() -> None:
    """Measure each folder, print a table each, write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of latents, or any fsspec URL of one")
    parser.add_argument("--per", choices=["set", "channel"], default="set", help="what gets a scale and shift (set)")
    parser.add_argument("--write", action="store_true", help="put them into latents.json of each folder")
    parser.add_argument("--read", action="store_true", help="read all latents, whatever the manifests say")
    arguments = parser.parse_args()
    with command_line("latent_stats"):
        from lvdm.data.latents import INFO_NAME, read_latent_set
        from lvdm.jobs.latent_stats import ChannelSums, check_same_autoencoder, measure, write_scaling
        from lvdm.jobs.progress import progress_line

        folders = list(dict.fromkeys(folder.rstrip("/") for folder in arguments.folders))
        check_same_autoencoder(folders)
        found = []
        for folder in folders:
            with progress_line(folder, "shards") as progress:
                found.append(measure(folder, progress, read=arguments.read))
            info = read_latent_set(folder)
            show(folder, found[-1])
            print(f"now {describe(found[-1].scaled(info.scale, info.shift))}, by the scale and shift of {INFO_NAME}\n")
        whole = functools.reduce(ChannelSums.merge, found)
        if len(folders) > 1:
            show(f"all {len(folders)} folders", whole)
        scale, shift = whole.scaling(arguments.per == "channel")
        print(f"a unit Gaussian needs scale {scale}, shift {shift}")
        for folder, sums in zip(folders, found, strict=True):
            print(f"  {folder}: then {describe(sums.scaled(scale, shift))}")
        if arguments.write:
            write_scaling(folders, scale, shift)
            print("\n".join(f"written to {folder}/{INFO_NAME}" for folder in folders))
        else:
            print(f"nothing is written; --write puts them into {INFO_NAME} of each folder")


def show(title: str, sums: ChannelSums) -> None:
    """Print a table: each channel, and all taken together, with the scale and shift that it asks for alone."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{title}: {sums.latents:,} latents, {sums.values:,} values a channel", highlight=False, markup=False)
    table = Table("channel", "mean", "std", "scale", "shift")
    channels = zip(map(str, range(len(sums.means))), sums.means, sums.deviations, strict=True)
    for name, mean, deviation in [*channels, ("all", *sums.pooled())]:
        scale = 1 / deviation if deviation else math.inf
        table.add_row(name, *(f"{value:.5g}" for value in (mean, deviation, scale, -mean)))
    console.print(table)


def describe(sums: ChannelSums) -> str:
    """Mean and standard deviation in words."""
    mean, deviation = sums.pooled()
    return f"mean {mean:.4f}, std {deviation:.4f}"


if __name__ == "__main__":
    main()
