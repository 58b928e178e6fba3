"""Import a checkpoint of another code base: weights, frozen models and all, into an exported folder.

    python tools/import_checkpoint.py short_sky.ckpt exports/short_sky --data-set sky
    python tools/import_checkpoint.py t2v.ckpt exports/t2v --layout lvdm-t2v
    python tools/import_checkpoint.py text-to-video-ms-1.7b exports/modelscope
    python tools/import_checkpoint.py stable-diffusion-v1-5 exports/inflated --model temporal_length=16

The last two are folders of diffusers: a whole pipeline, whose autoencoder, text encoder and tokenizer come along, or
its UNet alone. Stable Diffusion 1.x's UNet, which is inflated, may also be a .ckpt or .safetensors of CompVis' layout.
Go on training with run.init_from=OUT; hand it back with tools/export_checkpoint.py OUT FILE --layout LAYOUT.
A text encoder needs its tokenizer in OUT/tokenizer; files do not hold one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvdm.errors import UserError, command_line

LAYOUT_NAMES = "lvdm-{ae,short,pred,interp,t2v}, diffusers-unet3d, sd-unet"
MODEL_HELP = "config that no shape tells; for sd-unet temporal_length, relative_position, seed"


def main() -> None:
    """Parse and import with a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint (.ckpt, .pt, .safetensors) or folder of diffusers")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--layout", default="auto", help=f"{LAYOUT_NAMES}, or auto (auto)")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="averaged (ema) or live weights")
    parser.add_argument("--data-set", default="", help="whose scale and shift to take: sky, ucf, taichi")
    parser.add_argument("--scaling", default="", help="SCALE,SHIFT of the latents")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=VALUE", help=MODEL_HELP)
    arguments = parser.parse_args()
    with command_line("import_checkpoint"):
        from lvdm.jobs.import_checkpoint import import_checkpoint
        from lvdm.jobs.import_relatives import RELATIVES, import_relative, recognise
        from lvdm.jobs.progress import progress_line
        from lvdm.weights.layouts import LAYOUTS

        layout: str = arguments.layout
        if layout not in {"auto", *LAYOUTS, *RELATIVES}:
            raise UserError(f"--layout {layout} is none of auto, {', '.join([*LAYOUTS, *RELATIVES])}")
        scaling = read_scaling(arguments.data_set, arguments.scaling)
        if layout == "auto":
            layout = recognise(arguments.source) or "auto"
        with progress_line("importing", "tensors") as progress:
            if layout in RELATIVES:
                said = import_relative(
                    arguments.source,
                    arguments.out,
                    layout,
                    scaling=scaling,
                    model_values=arguments.model,
                    progress=progress,
                )
                print(f"{arguments.out}: {RELATIVES[layout]} ({layout}) of {arguments.source}: {said}")
                return
            layout = import_checkpoint(
                arguments.source,
                arguments.out,
                layout,
                weights=arguments.weights,
                scaling=scaling,
                model_values=arguments.model,
                progress=progress,
            )
        print(f"{arguments.out}: {LAYOUTS[layout].description} ({layout}) of {arguments.source}")


def read_scaling(data_set: str, scaling: str) -> tuple[float, float] | None:
    """Scale and shift from the command line; None if not given. Raises `UserError`."""
    from lvdm.weights.lvdm_release import SCALINGS

    if data_set:
        if data_set not in SCALINGS:
            raise UserError(f"--data-set {data_set} is none of {', '.join(SCALINGS)}")
        return SCALINGS[data_set]
    if not scaling:
        return None
    try:
        scale, shift = (float(part) for part in scaling.split(","))
    except ValueError:
        raise UserError(f"--scaling {scaling!r} is not of the form SCALE,SHIFT") from None
    return scale, shift


if __name__ == "__main__":
    main()
