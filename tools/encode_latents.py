"""Encode video shards into latent shards with the frozen VAE and text encoder of a training config.

    python tools/encode_latents.py --config configs/quickstart.yaml
    python tools/encode_latents.py --config configs/t2v_256.yaml --shards data/a/shards --out data/a/latents

Without --shards and --out, every folder of data.video.shards is encoded into the folder of data.latents.shards at the
same place in the list. A job that was stopped goes on where it was when it is started again, shards that changed since
are encoded again, and any number of processes, GPUs and nodes work on one --out (a path or URL that all see) when each
starts the same command. As a SLURM array of 16 workers with a GPU each:

    slurm/submit.sh --array=0-15 encode.sbatch --config configs/t2v_256.yaml

New captions or another text encoder for latents that are there, to be read with them by `join`:

    python tools/encode_latents.py --config configs/t2v_256.yaml --only text \\
        --shards data/a/shards --join data/a/captions --out data/a/text
"""

from __future__ import annotations

import argparse
import signal

from lvdm.config import (
    LatentDiffusionTraining,
    ShardSet,
    load_training_config,
    parse_config,
    shard_folders,
    shard_sets,
)
from lvdm.errors import Requeue, UserError, command_line


def main() -> None:
    """Parse, pair the folders, encode each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="training config that names clip, vae and text encoder")
    parser.add_argument("--shards", help="folder of video shards, or of captions for --only text")
    parser.add_argument("--out", help="folder for the latent shards")
    parser.add_argument(
        "--join", action="append", default=[], metavar="FOLDER", help="with --shards: sidecar to read too"
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="with --shards: encode such samples alone"
    )
    parser.add_argument("--clips", type=positive, default=1, help="most clips of a video (1)")
    parser.add_argument("--stored", choices=["fp32", "bf16"], default="fp32", help="type on disk (fp32)")
    parser.add_argument("--only", choices=["latents", "text"], help="what is encoded, if not both")
    parser.add_argument(
        "--frames-at-once", type=positive, help="frames in one call of the VAE (as many as fit in memory, up to 128)"
    )
    parser.add_argument(
        "--lease-seconds", type=positive, default=120, help="a worker silent for so long has its shard taken over (120)"
    )
    parser.add_argument("--verify", action="store_true", help="hold finished shards against their checksums")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the config")
    arguments = parser.parse_intermixed_args()
    with command_line("encode_latents", ranks=False):
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, stop)
            config = load_training_config(arguments.config, arguments.overrides)
            if not isinstance(config, LatentDiffusionTraining) or config.data.video is None:
                raise UserError(f"{arguments.config} must be a latent_diffusion config with data.video")
            encode_all(config, arguments)
        except Stopped as signalled:
            raise Requeue(f"{signalled}: the shards under way are given back") from None


class Stopped(KeyboardInterrupt):
    """SLURM takes the node away. No `Exception`, which would pass for a fault of what is under way."""


def stop(number: int, frame: object) -> None:
    """End in good order on a signal; a second one finds that under way. Raises `Stopped`."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def positive(text: str) -> int:
    """A number above 0. Raises `ValueError`."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def encode_all(config: LatentDiffusionTraining, arguments: argparse.Namespace) -> None:
    """Encode each pair of folders with a progress bar, and say what came of it."""
    import torch

    from lvdm.data.index import open_index
    from lvdm.jobs.encode_latents import Settings, encode_folder
    from lvdm.jobs.encoders import load_encoders
    from lvdm.jobs.progress import progress_line

    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    given_up: dict[str, int] = {}
    pairs = folder_pairs(config, arguments)
    open_index([folder for source, _ in pairs for folder in source.folders], check=False)  # before models are loaded
    encoders = load_encoders(config, device, dtype, arguments.only)
    for source, target in pairs:
        (folder,) = source.folders
        settings = Settings(
            stored=arguments.stored,
            clips=arguments.clips,
            only=arguments.only,
            where=source.where,
            join=source.join,
            frames_at_once=arguments.frames_at_once,
        )
        with progress_line(f"encoding {folder}", "samples") as progress:
            done = encode_folder(
                config,
                folder,
                target,
                device=device,
                dtype=dtype,
                settings=settings,
                encoders=encoders,
                lease_seconds=arguments.lease_seconds,
                verify=arguments.verify,
                progress=progress,
            )
        earlier = f", {done.skipped_shards} shards finished earlier" if done.skipped_shards else ""
        print(f"{target}: {done.samples} samples{earlier}, {len(done.failed)} left out as bad")
        for reason, count in done.passed_over.items():
            if count:
                print(f"  {count} samples of {folder} passed over: {reason}")
        if done.removed:
            print(f"  {len(done.removed)} shards removed whose source is gone or could not be read any more")
        for item in done.failed[:10]:
            print(f"  {item.shard} {item.key}: {item.reason}")
        for shard, reason in done.given_up.items():
            print(f"  {shard}: {reason}")
        if done.given_up:
            given_up[f"{target}/.failed"] = len(done.given_up)
    if given_up:
        raise UserError(
            f"{sum(given_up.values())} shards could not be encoded; mend them, remove {' and '.join(given_up)} and "
            f"start again"
        )


def folder_pairs(config: LatentDiffusionTraining, arguments: argparse.Namespace) -> list[tuple[ShardSet, str]]:
    """Sources of one folder each, and their target folders. Raises `UserError` where they do not pair up."""
    tree = {"folders": [arguments.shards], "where": arguments.where, "join": arguments.join}
    if bool(arguments.shards) != bool(arguments.out) or (not arguments.shards and (arguments.where or arguments.join)):
        raise UserError("give --shards and --out, with --where and --join if you like, or none of them")
    if arguments.shards:
        return [(parse_config(ShardSet, tree, source="the command line"), arguments.out)]
    assert config.data.video is not None
    videos = [
        one.model_copy(update={"folders": (folder,)})
        for one in shard_sets(config.data.video.shards)
        for folder in one.folders
    ]
    latents = shard_folders(config.data.latents.shards) if config.data.latents else []
    if len(videos) != len(latents):
        raise UserError(
            f"data.video.shards has {len(videos)} folders, data.latents.shards {len(latents)}; give --shards"
        )
    return list(zip(videos, latents, strict=True))


if __name__ == "__main__":
    main()
