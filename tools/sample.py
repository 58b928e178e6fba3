"""Sample clips from captions: an mp4 and a gif each, and one contact sheet.

    python tools/sample.py exports/quickstart out --prompt "a red circle moves left on a blue background" --seed 7
    python tools/sample.py exports/quickstart out --prompts-file captions.txt --sampler dpmpp --steps 20 --guidance 5

    python tools/sample.py exports/short_sky out --clips 8          (a model without text)

Clip i uses seed + i. The same export, prompt, seed and options give the same clip.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lvdm.errors import UserError, command_line

_WATCHABLE = 128
"""Height in pixels to which smaller clips are enlarged by whole multiples."""


def main() -> None:
    """Parse, read the prompts, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported folder")
    parser.add_argument("out", type=Path, help="folder for the samples, made if missing")
    parser.add_argument("--prompt", action="append", default=[], help="caption; may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="text file with a caption a line")
    parser.add_argument("--clips", type=int, default=0, help="clips of a model that reads no text")
    parser.add_argument("--negative", default="", help="caption that guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (0)")
    parser.add_argument("--sampler", default="", help="ddim, ddpm, dpmpp, unipc or flow_euler (ddim; flow: flow_euler)")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance, 1 for none (7.5)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (0)")
    parser.add_argument("--fps", type=int, default=8, help="frames a second of the files (8)")
    parser.add_argument("--batch", type=int, default=8, help="clips sampled at once (8)")
    arguments = parser.parse_args()
    with command_line("sample"):
        prompts = (
            read_prompts(arguments.prompt, arguments.prompts_file) if not arguments.clips else [""] * arguments.clips
        )
        sample_all(arguments, prompts)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Captions from the command line and the file. Raises `UserError` if there are none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts-file {file}: {error}") from None
    prompts = given + [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("no captions: give --prompt or --prompts-file")
    return prompts


def sample_all(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Sample with a progress bar and write ``clip-NNNN.{mp4,gif}``, ``samples.json`` and ``contact_sheet.png``."""
    from lvdm.inference import load
    from lvdm.jobs.progress import progress_line
    from lvdm.media import contact_sheet, write_gif, write_mp4

    model = load(arguments.model)
    flow = model.config.diffusion.parameterization == "flow"
    seeds = [arguments.seed + i for i in range(len(prompts))]
    with progress_line("sampling", "steps") as progress:
        clips = model.sample(
            prompts,
            seeds=seeds,
            negative_prompts=[arguments.negative] * len(prompts),
            steps=arguments.steps,
            guidance=arguments.guidance,
            sampler=arguments.sampler or ("flow_euler" if flow else "ddim"),
            eta=arguments.eta,
            batch=arguments.batch,
            progress=progress,
        ).numpy()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scale = max(1, _WATCHABLE // clips.shape[2])
    for number, clip in enumerate(clips):
        write_mp4(arguments.out / f"clip-{number:04d}.mp4", clip, arguments.fps, scale=scale)
        write_gif(arguments.out / f"clip-{number:04d}.gif", clip, arguments.fps, scale=scale)
    contact_sheet(arguments.out / "contact_sheet.png", list(clips), prompts)
    record = {"model": str(arguments.model), "prompts": prompts, "seeds": seeds} | {
        name: getattr(arguments, name) for name in ("negative", "sampler", "steps", "guidance", "eta")
    }
    (arguments.out / "samples.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {len(prompts)} clips as mp4 and gif, contact_sheet.png")


if __name__ == "__main__":
    main()
