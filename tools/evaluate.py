"""Score sampled videos.

    python tools/evaluate.py --metric shapes demo/samples --out scores.json
    python tools/evaluate.py --metric fvd samples --real videos --i3d i3d_pretrained_400.pt --out fvd.json

shapes  for captions of moving shapes ("a red circle moves left"): how often shape, colour and motion of the clips
        are what the captions say, measured from the pixels, with 95 % intervals; beside chance (the same clips, each
        other's captions) and the ceiling (true clips through the model's autoencoder).
fvd     Fréchet and kernel distance of I3D's features (FVD, KVD) between sampled and real clips, each a folder of videos
        or an .npz / .npy of uint8 [N, T, H, W, 3]. Published numbers use 2048 clips of 16 frames at 256 x 256 on each
        side and i3d_pretrained_400.pt of github.com/SongweiGe/TATS; scores of fewer clips are higher.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lvdm.errors import UserError, command_line


def main() -> None:
    """Parse, score with a progress bar, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="sampled clips")
    parser.add_argument("--metric", choices=["shapes", "fvd"], required=True)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--real", type=Path, help="fvd: real clips")
    parser.add_argument("--i3d", type=Path, help="fvd: weights of I3D")
    parser.add_argument("--frames", type=int, default=16, help="fvd: frames of a clip (16)")
    parser.add_argument("--size", type=int, default=256, help="fvd: height and width that videos are brought to (256)")
    parser.add_argument("--stride", type=int, default=1, help="fvd: video frames from one real frame to the next (1)")
    parser.add_argument("--limit", type=int, default=2048, help="fvd: clips used of either set (2048)")
    parser.add_argument("--redraws", type=int, default=1, help="fvd: times that real clips are drawn anew (1)")
    parser.add_argument("--batch", type=int, default=8, help="fvd: clips that I3D sees at once (8)")
    arguments = parser.parse_args()
    with command_line("evaluate"):
        result = score_fvd(arguments) if arguments.metric == "fvd" else score_shapes(arguments.samples)
        if arguments.out:
            from lvdm.storage import write_json

            write_json(arguments.out, result)


def score_shapes(samples: Path) -> dict[str, Any]:
    """How well clips follow captions of moving shapes, printed."""
    from rich.console import Console
    from rich.table import Table

    from lvdm.jobs.progress import progress_line
    from lvdm.jobs.score_shapes import score_folder

    with progress_line("checking", "clips") as progress:
        result = score_folder(samples, progress)
    parts = ("all", "trained", "unseen")
    titles = [f"{part}, {result[part]['shape']['of']} clips" for part in parts]
    table = Table("right", *titles, "chance", "ceiling", title=f"{samples}: shares, with 95 % intervals")
    for aspect in result["all"]:
        cells = [
            f"{100 * result[part][aspect]['share']:.0f} % ({' - '.join(f'{100 * end:.0f}' for end in ends)})"
            for part in parts
            for ends in [result[part][aspect]["interval"]]
        ]
        # one clip has no other's caption, and so no chance
        chance = f"{100 * result['chance'][aspect]:.0f} %" if result["chance"] else "-"
        table.add_row(aspect, *cells, chance, f"{100 * result['ceiling'][aspect]['share']:.0f} %")
    Console().print(table)
    return result


def score_fvd(arguments: argparse.Namespace) -> dict[str, Any]:
    """FVD and KVD, printed."""
    if arguments.real is None or arguments.i3d is None:
        raise UserError("--metric fvd needs --real and --i3d")
    for name in ("frames", "size", "stride", "limit", "redraws", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)} must be at least 1")
    import torch

    from lvdm.config import ClipConfig
    from lvdm.jobs.fvd import Clips, fvd
    from lvdm.jobs.progress import progress_line

    size = {"frames": arguments.frames, "height": arguments.size, "width": arguments.size}
    with progress_line("evaluating", "clips") as progress:
        result = fvd(
            Clips(arguments.real, ClipConfig(**size, stride=arguments.stride), arguments.limit),
            Clips(arguments.samples, ClipConfig(**size, start="first"), arguments.limit),
            arguments.i3d,
            redraws=arguments.redraws,
            batch=arguments.batch,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            progress=progress,
        )
    clips = result["clips"]
    for name in ("fvd", "kvd"):
        values = result[name]["redraws"]
        spread = f", {min(values):.4g} to {max(values):.4g} over {len(values)} draws of the real" * (len(values) > 1)
        print(
            f"{name.upper()} {result[name]['mean']:.4g}{spread} ({clips['fake']} sampled, {clips['real']} real clips)"
        )
    for file, reason in list(result["unreadable"].items())[:1]:
        print(f"{len(result['unreadable'])} files could not be used, the first: {file}: {reason}")
    return result


if __name__ == "__main__":
    main()
