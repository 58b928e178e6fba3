"""Export a run's weights to one safetensors file and a config, straight from the fragments of its checkpoint.

python tools/export_checkpoint.py runs/quickstart exports/quickstart
python tools/export_checkpoint.py runs/quickstart/checkpoints/step-00000500 exports/live_500 --weights live

With --layout, write a file that another code base reads, from a run or from an exported or imported folder. LVDM's
layouts are .ckpt files as torch.save writes them, with both the averaged and the live weights.

python tools/export_checkpoint.py exports/short_sky short_sky.ckpt --layout lvdm-short
python tools/export_checkpoint.py runs/modelscope exports/for_diffusers --layout diffusers-unet3d
python tools/export_checkpoint.py runs/inflated exports/frames.safetensors --layout sd-unet

For diffusers a folder is written: with diffusers-unet3d a whole TextToVideoSDPipeline where autoencoder (AutoencoderKL)
and text encoder (CLIP) are to be had, else the UNet alone; with sd-unet the 2-D part as UNet2DConditionModel, or, where
OUT ends in .safetensors, a file of CompVis' layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvdm.errors import UserError, command_line

LAYOUT_HELP = "foreign layout: lvdm-{ae,short,pred,interp,t2v}, diffusers-unet3d, sd-unet; default ours"


def main() -> None:
    """Parse and export with a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder, or the folder of one checkpoint")
    parser.add_argument("out", type=Path, help="new folder (or file, with --layout) for the exported model")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="averaged (ema) or live weights")
    parser.add_argument("--layout", default="", help=LAYOUT_HELP)
    arguments = parser.parse_args()
    with command_line("export_checkpoint"):
        if arguments.layout:
            export_foreign(arguments)
            return
        from lvdm.jobs.export import export_checkpoint
        from lvdm.jobs.progress import progress_line

        with progress_line("exporting", "tensors") as progress:
            checkpoint = export_checkpoint(arguments.source, arguments.out, arguments.weights, progress)
        size = (arguments.out / "model.safetensors").stat().st_size / 1e6
        print(f"{arguments.out}: {arguments.weights} weights of {checkpoint.folder}, {size:.1f} MB")


def export_foreign(arguments: argparse.Namespace) -> None:
    """Write another code base's layout."""
    from lvdm.jobs.export_layout import export_layout
    from lvdm.jobs.export_relatives import export_relative
    from lvdm.jobs.import_relatives import RELATIVES
    from lvdm.jobs.progress import progress_line
    from lvdm.weights.layouts import LAYOUTS

    if arguments.layout not in {*LAYOUTS, *RELATIVES}:
        raise UserError(f"--layout {arguments.layout} is none of {', '.join([*LAYOUTS, *RELATIVES])}")
    if arguments.layout in RELATIVES:
        with progress_line("exporting", "tensors") as progress:
            said = export_relative(arguments.source, arguments.out, arguments.layout, arguments.weights, progress)
        print(f"{arguments.out}: {arguments.layout}: {said}")
        return
    with progress_line("exporting", "tensors") as progress:
        tensors = export_layout(arguments.source, arguments.out, arguments.layout, progress)
    print(f"{arguments.out}: {arguments.layout}, {len(tensors)} tensors, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
