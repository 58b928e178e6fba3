"""Export a run's weights to one safetensors file and a config, straight from the fragments of its checkpoint.

python tools/export_checkpoint.py runs/quickstart exports/quickstart
python tools/export_checkpoint.py runs/quickstart/checkpoints/step-00000500 exports/live_500 --weights live

With --layout, write a file that another code base reads, from a run or from an exported or imported folder. LVDM's
layouts are .ckpt files as torch.save writes them, with both the averaged and the live weights.

python tools/export_checkpoint.py exports/short_sky short_sky.ckpt --layout lvdm-short
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lvdm.errors import command_line


def main() -> None:
    """Parse and export with a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder, or the folder of one checkpoint")
    parser.add_argument("out", type=Path, help="new folder for the exported model")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="averaged (ema) or live weights")
    parser.add_argument("--layout", default="", help="foreign layout: lvdm-{ae,short,pred,interp,t2v}; default ours")
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
    from lvdm.jobs.progress import progress_line

    with progress_line("exporting", "tensors") as progress:
        tensors = export_layout(arguments.source, arguments.out, arguments.layout, progress)
    print(f"{arguments.out}: {arguments.layout}, {len(tensors)} tensors, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
