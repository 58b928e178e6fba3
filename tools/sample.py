"""Sample clips from captions: an mp4 and a gif each, and one contact sheet.

    python tools/sample.py exports/quickstart out --prompt "a red circle moves left" --seed 7
    python tools/sample.py exports/quickstart out --prompts-file captions.txt --sampler dpmpp --steps 20 --guidance 5
    deepspeed --num_gpus 2 tools/sample.py exports/quickstart out --prompts-file requests.jsonl      (two ranks)
    python tools/sample.py exports/short_sky out --clips 8                            (a model without text)

A prompts file has a caption a line; a .jsonl has objects with prompt and, if wanted, seed and negative. Clip i uses
seed + i unless its line says otherwise. The same export, prompt, seed, options and --batch give the same clip, on any
number of ranks. The same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lvdm.errors import UserError, command_line

if TYPE_CHECKING:
    from lvdm.jobs.sample import Request


def main() -> None:
    """Parse, read the prompts, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder, or URL of one")
    parser.add_argument("out", type=Path, help="folder for the samples, made if missing")
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="text file with a caption a line, or .jsonl")
    parser.add_argument("--clips", type=int, default=0, help="clips of a model that reads no text")
    parser.add_argument("--negative", default="", help="caption that guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (0)")
    parser.add_argument("--sampler", help="ddim, ddpm, dpmpp, unipc or flow_euler (ddim; flow: flow_euler)")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance, 1 for none (7.5)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (0)")
    parser.add_argument("--frames", type=int, help="length of the clips (that of training)")
    parser.add_argument("--fps", type=int, default=8, help="frames a second of the files (8)")
    parser.add_argument("--batch", type=int, default=8, help="clips sampled at once (8)")
    parser.add_argument("--no-gif", action="store_false", dest="gif", help="write mp4 alone")
    parser.add_argument("--rows", type=int, default=16, help="clips on the contact sheet, 0 for none (16)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    arguments = parser.parse_args()
    with command_line("sample"):
        requests = requests_of(arguments)
        from lvdm.jobs.sample import Settings, sample_folder

        names = ("steps", "guidance", "sampler", "eta", "frames", "batch", "fps", "gif", "rows")
        settings = Settings(**{name: getattr(arguments, name) for name in names})
        sample_folder(arguments.model, arguments.out, requests, settings)


def requests_of(arguments: argparse.Namespace) -> list[Request]:
    """What to sample. Raises `UserError` if that is nothing."""
    from lvdm.jobs.sample import Request, read_requests

    if arguments.clips and (arguments.prompt or arguments.prompts_file):
        raise UserError("--clips is for a model that reads no text: give it, or captions")
    prompts = arguments.prompt or [""] * arguments.clips
    requests = [Request(prompt, arguments.seed + i, arguments.negative) for i, prompt in enumerate(prompts)]
    if arguments.prompts_file:
        requests += read_requests(arguments.prompts_file, arguments.seed + len(requests), arguments.negative)
    if not requests:
        raise UserError("no captions: give --prompt or --prompts-file (or --clips, for a model that reads no text)")
    return requests


if __name__ == "__main__":
    main()
