"""The whole chain on this machine, from nothing to videos sampled from text. Everything it makes is in ./demo.

    python tools/demo.py            some minutes on two CPU cores
    python tools/demo.py --toy      the same commands at toy length, to see that they work

Each stage is an ordinary command, printed before it runs. A stage that is complete is not run again; one that was
stopped goes on where it was. Remove ./demo to start over.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
PROMPTS = (
    "a red circle moves left",
    "a green square moves up",
    "a blue triangle moves right",
    "a yellow cross moves down",
)


@dataclass(frozen=True)
class Stage:
    """One command of the chain."""

    name: str
    command: tuple[str, ...]
    where: Path
    """Folder of what it makes."""
    complete: Path
    """What exists in there once the stage is complete."""
    describe: Callable[[], str]
    """What was made, for the table at the end."""
    restart: bool = True
    """Whether what an unfinished stage left is removed first; training and encoding go on instead."""


def main() -> None:
    """Run the stages that are not complete, then say what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few clips and steps only")
    toy = parser.parse_args().toy
    console = Console()
    rows = []
    chain = stages(toy)
    for number, stage in enumerate(chain, start=1):
        console.rule(f"{number}/{len(chain)} {stage.name}")
        begin = time.perf_counter()
        done = stage.complete.exists()
        if done:
            console.print(f"already there: {stage.where}")
        else:
            run(stage, console)
        seconds = time.perf_counter() - begin
        rows.append((stage.name, "-" if done else f"{seconds:.0f} s", stage.describe(), str(stage.where)))
    table = Table("stage", "time", "made", title="What was made")
    table.add_column("where", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Look at {DEMO / 'samples' / 'contact_sheet.png'} and the clips beside it.")
    console.print(f"Curves and pictures: tensorboard --logdir {DEMO / 'runs'}", highlight=False)


def run(stage: Stage, console: Console) -> None:
    """Run a stage in the current folder; its failure ends the demo with the same exit code."""
    if stage.restart and stage.where.is_dir():
        shutil.rmtree(stage.where)
    shown = [part.removeprefix(f"{ROOT}/") for part in stage.command]
    console.print(f"$ {shlex.join(shown)}", style="bold", highlight=False, soft_wrap=True)
    command = [sys.executable, *stage.command]
    if stage.command[0] == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), *stage.command[1:]]
    code = subprocess.run(command).returncode
    if code:
        console.print(f"the stage '{stage.name}' ended with exit code {code}; run it again with the command above")
        sys.exit(code)


def stages(toy: bool) -> list[Stage]:
    """The chain, with every command as a user would type it."""
    tools, configs, train = ROOT / "tools", ROOT / "configs", ROOT / "launch" / "train.py"
    shards, runs, latents = DEMO / "shards", DEMO / "runs", DEMO / "latents"
    exports, samples = DEMO / "exports", DEMO / "samples"
    few_clips = ("--clips", "48", "--held-out-clips", "16", "--shard-size", "16") if toy else ()
    steps, short = (4, ("run.steps=4", "run.log_every=2", "validation.samples=16")) if toy else (0, ())
    diffusion = str(configs / "quickstart.yaml")
    autoencoder = str(configs / "quickstart_ae.yaml")
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    make_shards, encode = str(tools / "make_shards.py"), str(tools / "encode_latents.py")
    export = str(tools / "export_checkpoint.py")
    return [
        Stage(
            "moving shapes",
            (make_shards, "shapes", "--out", str(shards / "shapes"), *few_clips),
            shards / "shapes",
            shards / "shapes" / "held_out" / "index.arrow",
            lambda: size_of(shards / "shapes", "*/*.tar", "shards of captioned clips"),
        ),
        Stage(
            "real footage",
            (make_shards, "footage", "--size", "64", "--out", str(shards / "footage")),
            shards / "footage",
            shards / "footage" / "index.arrow",
            lambda: size_of(shards / "footage", "*.tar", "shards of captioned clips"),
        ),
        Stage(
            "autoencoder",
            ("deepspeed", "--num_gpus", "2", str(train), "--config", autoencoder, *short),
            runs / "autoencoder",
            finished(runs / "autoencoder", autoencoder, steps),
            lambda: "run folder: log, pictures, checkpoints",
            restart=False,
        ),
        Stage(
            "export autoencoder",
            (export, str(runs / "autoencoder"), str(exports / "autoencoder")),
            exports / "autoencoder",
            exports / "autoencoder" / "config.json",
            lambda: size_of(exports / "autoencoder", "*.safetensors", "file of averaged weights"),
        ),
        Stage(
            "latents",
            (encode, "--config", diffusion),
            latents / "train",
            latents / "train" / "latents.json",
            lambda: size_of(latents / "train", "*.tar", "shards of latents and text states"),
            restart=False,
        ),
        Stage(
            "held-out latents",
            (
                *(encode, "--config", diffusion),
                *("--shards", str(shards / "shapes" / "held_out"), "--out", str(latents / "held_out")),
            ),
            latents / "held_out",
            latents / "held_out" / "latents.json",
            lambda: size_of(latents / "held_out", "*.tar", "shards of combinations never trained on"),
            restart=False,
        ),
        Stage(
            "text-to-video",
            ("deepspeed", "--num_gpus", "2", str(train), "--config", diffusion, *short),
            runs / "diffusion",
            finished(runs / "diffusion", diffusion, steps),
            lambda: "run folder: log, checkpoints",
            restart=False,
        ),
        Stage(
            "export",
            (export, str(runs / "diffusion"), str(exports / "diffusion")),
            exports / "diffusion",
            exports / "diffusion" / "config.json",
            lambda: size_of(exports / "diffusion", "*.safetensors", "file of averaged weights, autoencoder with it"),
        ),
        Stage(
            "samples",
            (
                *("deepspeed", "--num_gpus", "2", str(tools / "sample.py"), str(exports / "diffusion"), str(samples)),
                *(prompts if toy else ("--prompts-file", str(configs / "shapes_captions.txt"))),
                *("--steps", "5" if toy else "20", "--guidance", "3", "--batch", "2" if toy else "32", "--seed", "0"),
            ),
            samples,
            samples / "contact_sheet.png",
            lambda: size_of(samples, "*.mp4", "clips as mp4 and gif, and a contact sheet"),
            restart=False,
        ),
        Stage(
            "scores",
            (str(tools / "evaluate.py"), "--metric", "shapes", str(samples), "--out", str(DEMO / "scores.json")),
            DEMO / "scores.json",
            DEMO / "scores.json",
            scores,
        ),
    ]


def scores() -> str:
    """Shares of clips that show what their captions say."""
    parts = json.loads((DEMO / "scores.json").read_text(encoding="utf-8"))
    shown = [f"{name} {100 * parts['all'][name]['share']:.0f} %" for name in ("shape", "color", "motion")]
    return f"right: {', '.join(shown)}"


def finished(run_folder: Path, config: str, steps: int) -> Path:
    """The last checkpoint of a run of ``steps`` steps; 0: as many as the config says."""
    from lvdm.config import load_training_config

    return run_folder / "checkpoints" / f"step-{steps or load_training_config(config).run.steps:08d}"


def size_of(folder: Path, pattern: str, what: str) -> str:
    """Number and size of files."""
    files = list(folder.glob(pattern))
    return f"{len(files)} {what}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
