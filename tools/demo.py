"""The whole chain on this machine, from nothing to scored videos. Everything it makes is in ./demo, or ./learn.

    python tools/demo.py            some minutes on two CPU cores
    python tools/demo.py --learn    half an hour: the same chain, longer (configs/shapes_ae.yaml, configs/shapes.yaml)
    python tools/demo.py --toy      the demo's commands at toy length, to see that they work

Each stage is an ordinary command, printed before it runs. A stage that is complete is not run again; one that was
stopped goes on where it was. Remove the folder to start over.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lvdm.errors import UserError, command_line
from lvdm.storage import read_json, write_json
from lvdm.train.run_folder import describe_environment

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, TOOLS, TRAIN = ROOT / "configs", ROOT / "tools", ROOT / "launch" / "train.py"
CAPTIONS = CONFIGS / "shapes_captions.txt"
TOY_PROMPTS = (
    "a red circle moves left",
    "a green square moves up",
    "a blue triangle moves right",
    "a yellow cross moves down",
)


@dataclass(frozen=True)
class Chain:
    """Which chain is run, and where."""

    folder: Path
    autoencoder: Path
    """Config of stage 1."""
    diffusion: Path
    """Config of stage 2."""
    clips: tuple[str, ...] = ()
    """Options of how many moving shapes are made."""
    footage: bool = True
    """Whether real footage is made for the autoencoder too."""
    toy: bool = False


DEMO = Chain(Path("demo"), CONFIGS / "quickstart_ae.yaml", CONFIGS / "quickstart.yaml")
LEARN = Chain(
    Path("learn"), CONFIGS / "shapes_ae.yaml", CONFIGS / "shapes.yaml", clips=("--clips", "5600"), footage=False
)
TOY = replace(DEMO, toy=True, clips=("--clips", "48", "--held-out-clips", "16", "--shard-size", "16"))


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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--learn", action="store_true", help="the chain with the longer budget, in ./learn")
    which.add_argument("--toy", action="store_true", help="a few clips and steps only")
    arguments = parser.parse_args()
    with command_line("demo"):
        run_chain(LEARN if arguments.learn else TOY if arguments.toy else DEMO)


def run_chain(chain: Chain) -> None:
    """Run what is not complete of a chain. Raises `UserError` if its folder holds what another one made."""
    claim(chain)
    console = Console()
    spent = Spent(chain.folder / "seconds.json")
    rows = []
    every = stages(chain)
    for number, stage in enumerate(every, start=1):
        console.rule(f"{number}/{len(every)} {stage.name}")
        if stage.complete.exists():
            console.print(f"already there: {stage.where}")
        else:
            with spent.counting(stage.name):
                run(stage, console)
        rows.append((stage.name, spent.shown(stage.name), stage.describe(), str(stage.where)))
    write_result(chain, every, spent)
    table = Table("stage", "time", "made", title="What was made")
    table.add_column("where", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Look at {chain.folder / 'report.html'}, and at the clips in {chain.folder / 'samples'}.")
    console.print(f"Curves and pictures: tensorboard --logdir {chain.folder / 'runs'}", highlight=False)


def claim(chain: Chain) -> None:
    """Note which command a folder belongs to: a demo on a toy's clips would score what it never trained on."""
    path = chain.folder / "chain.json"
    command = {"command": command_of(chain)}
    if path.is_file() and read_json(path) != command:
        raise UserError(f"{chain.folder} was made by {read_json(path).get('command')}; remove it to run another chain")
    write_json(path, command)


def command_of(chain: Chain) -> str:
    """How a chain is started."""
    return f"python tools/demo.py{' --learn' * (chain is LEARN)}{' --toy' * chain.toy}"


class Spent:
    """Seconds spent on each stage, over all attempts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    @contextlib.contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Count the time inside the block, also if it ends early."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            write_json(self._path, self.seconds)

    def shown(self, name: str) -> str:
        """The time of a stage for the table."""
        return f"{self.seconds[name]:.0f} s" if name in self.seconds else "-"


def write_result(chain: Chain, every: list[Stage], spent: Spent) -> None:
    """Write what was run, with which versions, for how long, and what it scored, to ``result.json``."""
    result = {
        "command": command_of(chain),
        "seconds": {"all": sum(spent.seconds.values()), **spent.seconds},
        "commands": [shlex.join(as_typed(stage)) for stage in every],
        "cpus": os.cpu_count(),
        "environment": describe_environment(),
        "scores": read_json(chain.folder / "scores.json"),
    }
    write_json(chain.folder / "result.json", result)


def run(stage: Stage, console: Console) -> None:
    """Run a stage in the current folder; its failure ends the demo with the same exit code."""
    if stage.restart and stage.where.is_dir():
        shutil.rmtree(stage.where)
    console.print(f"$ {shlex.join(as_typed(stage))}", style="bold", highlight=False, soft_wrap=True)
    command = [sys.executable, *stage.command]
    if stage.command[0] == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), *stage.command[1:]]
    code = subprocess.run(command).returncode
    if code:
        console.print(f"the stage '{stage.name}' ended with exit code {code}; run it again with the command above")
        sys.exit(code)


def as_typed(stage: Stage) -> list[str]:
    """A stage's command as a user types it at the root of the repository."""
    return [part.removeprefix(f"{ROOT}/") for part in stage.command]


def stages(chain: Chain) -> list[Stage]:
    """The chain, with every command as a user would type it."""
    folder, toy = chain.folder, chain.toy
    shards, runs, latents = folder / "shards", folder / "runs", folder / "latents"
    exports, samples = folder / "exports", folder / "samples"
    steps, short = (4, ("run.steps=4", "run.log_every=2", "validation.samples=16")) if toy else (0, ())
    prompts = [part for prompt in TOY_PROMPTS for part in ("--prompt", prompt)]
    make_shards, encode = str(TOOLS / "make_shards.py"), str(TOOLS / "encode_latents.py")
    export, train = str(TOOLS / "export_checkpoint.py"), str(TRAIN)
    autoencoder, diffusion = str(chain.autoencoder), str(chain.diffusion)
    footage = Stage(
        "real footage",
        (make_shards, "footage", "--size", "64", "--out", str(shards / "footage")),
        shards / "footage",
        shards / "footage" / "index.arrow",
        lambda: size_of(shards / "footage", "*.tar", "shards of captioned clips"),
    )
    return [
        Stage(
            "moving shapes",
            (make_shards, "shapes", "--out", str(shards / "shapes"), *chain.clips),
            shards / "shapes",
            shards / "shapes" / "held_out" / "index.arrow",
            lambda: size_of(shards / "shapes", "*/*.tar", "shards of captioned clips"),
        ),
        *([footage] if chain.footage else []),
        Stage(
            "autoencoder",
            ("deepspeed", "--num_gpus", "2", train, "--config", autoencoder, *short),
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
            ("deepspeed", "--num_gpus", "2", train, "--config", diffusion, *short),
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
                *("deepspeed", "--num_gpus", "2", str(TOOLS / "sample.py"), str(exports / "diffusion"), str(samples)),
                *(prompts if toy else ("--prompts-file", str(CAPTIONS))),
                *("--steps", "5" if toy else "20", "--guidance", "3", "--batch", "2" if toy else "32", "--seed", "0"),
            ),
            samples,
            samples / "contact_sheet.png",
            lambda: size_of(samples, "*.mp4", "clips as mp4 and gif, and a contact sheet"),
            restart=False,
        ),
        Stage(
            "scores",
            (str(TOOLS / "evaluate.py"), "--metric", "shapes", str(samples), "--out", str(folder / "scores.json")),
            folder / "scores.json",
            folder / "scores.json",
            lambda: scores(folder / "scores.json"),
        ),
        Stage(
            "report",
            (
                *(str(TOOLS / "report.py"), str(runs / "diffusion"), "--out", str(folder / "report.html")),
                *("--samples", str(samples), "--scores", str(folder / "scores.json")),
                *("--curves", str(folder / "curves.png")),
            ),
            folder / "report.html",
            folder / "report.html",
            lambda: "one page: scores, samples, curves",
        ),
    ]


def scores(path: Path) -> str:
    """Shares of clips that show what their captions say."""
    parts = read_json(path)
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
