"""Export weights to safetensors and a config, straight from the fragments of a checkpoint.

python tools/export_checkpoint.py runs/quickstart exports/quickstart
python tools/export_checkpoint.py runs/quickstart/checkpoints/step-00000500 exports/live_500 --weights live
python tools/export_checkpoint.py s3://bucket/run/checkpoints exports/half --dtype bf16 --shard-size 2GB --verify
python tools/export_checkpoint.py runs/quickstart exports/mean --average 3
python tools/export_checkpoint.py runs/one exports/soup --also runs/two --also runs/three/checkpoints/step-00000900

Of a run or a folder of checkpoints the newest good one is taken; one that is damaged is named and passed over. One
tensor is in memory at a time, also of averages and with --verify. OUT is written whole or not at all.

With --layout, write what another code base reads, from a run or from an exported or imported folder. LVDM's layouts
are .ckpt files as torch.save writes them; lvdm-short, lvdm-pred and lvdm-interp hold both averaged and live weights.

python tools/export_checkpoint.py exports/short_sky short_sky.ckpt --layout lvdm-short
python tools/export_checkpoint.py runs/modelscope exports/for_diffusers --layout diffusers-unet3d
python tools/export_checkpoint.py runs/inflated exports/frames.safetensors --layout sd-unet

For diffusers a folder is written: with diffusers-unet3d a whole TextToVideoSDPipeline where autoencoder (AutoencoderKL)
and text encoder (CLIP) are to be had, else the UNet alone; with sd-unet the 2-D part as UNet2DConditionModel, or, where
OUT ends in .safetensors, a file of CompVis' layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvdm.errors import UserError, command_line

if TYPE_CHECKING:
    from lvdm.jobs.export_source import Choice

LAYOUT_HELP = "foreign layout: lvdm-{ae,short,pred,interp,t2v}, diffusers-unet3d, sd-unet; default ours"
SHARD_HELP = "tensors of more bytes than this go into several files with an index (5GB)"


def main() -> None:
    """Parse and export with a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run, folder of checkpoints or one checkpoint; also an fsspec URL")
    parser.add_argument("out", type=Path, help="new folder (or file, with --layout) for the exported model")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="averaged (ema) or live weights")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the best validation, not the newest")
    parser.add_argument("--average", type=int, default=1, metavar="N", help="mean of the newest N checkpoints")
    parser.add_argument("--also", action="append", default=[], metavar="PATH", help="another source for the mean")
    parser.add_argument("--network", default="", help="network to export where a checkpoint holds several (model)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="type of the weights (fp32; as imported)")
    parser.add_argument("--shard-size", default="", metavar="SIZE", help=SHARD_HELP)
    parser.add_argument("--verify", action="store_true", help="read what was written again and compare every bit")
    parser.add_argument("--layout", default="", help=LAYOUT_HELP)
    arguments = parser.parse_args()
    with command_line("export_checkpoint"):
        from lvdm.checkpoint.manifest import MODEL
        from lvdm.jobs.export import bytes_of, export_checkpoint
        from lvdm.jobs.export_source import Choice
        from lvdm.weights.native import Writing

        network = arguments.network or MODEL
        choice = Choice(arguments.weights, network, arguments.average, tuple(arguments.also), arguments.best)
        size = {"shard_size": bytes_of(arguments.shard_size)} if arguments.shard_size else {}
        writing = Writing(**size, verify=arguments.verify)
        if arguments.layout:
            print(run(lambda **watch: foreign(arguments, choice, writing=writing, **watch)))
            return
        dtype = arguments.dtype or "fp32"
        done = run(
            lambda **watch: export_checkpoint(
                arguments.source, arguments.out, choice, dtype=dtype, writing=writing, **watch
            )
        )
        origin = (
            f"the mean of {len(done.checkpoints)} checkpoints" if len(done.checkpoints) > 1 else done.checkpoints[0]
        )
        files = f" in {done.files} files" if done.files > 1 else ""
        same = ", read again and the same" if arguments.verify else ""
        print(f"{arguments.out}: {arguments.weights} weights of {origin}, {done.bytes / 1e6:.1f} MB{files}{same}")


def run(export: Callable[..., Any]) -> Any:
    """What ``export`` gives, with a line of progress in MB and its notes on stderr."""
    from lvdm.jobs.progress import megabytes, progress_line

    with progress_line("exporting", "MB") as line:
        return export(progress=megabytes(line), note=lambda text: print(text, file=sys.stderr))


def foreign(arguments: argparse.Namespace, choice: Choice, **how: Any) -> str:
    """Write another code base's layout; what was written, in one line."""
    from lvdm.jobs.export_layout import export_layout
    from lvdm.jobs.export_relatives import export_relative
    from lvdm.jobs.import_relatives import RELATIVES
    from lvdm.weights.layouts import LAYOUTS

    source, out, layout = arguments.source, arguments.out, arguments.layout
    if layout not in {*LAYOUTS, *RELATIVES}:
        raise UserError(f"--layout {layout} is none of {', '.join([*LAYOUTS, *RELATIVES])}")
    if arguments.network:
        raise UserError(f"--layout {layout} has a place for the network that a run trains alone; leave --network out")
    if arguments.shard_size and (layout in LAYOUTS or out.suffix == ".safetensors"):
        raise UserError(f"--layout {layout} is one file, which {out} will be; leave --shard-size out")
    if layout in RELATIVES:
        said = export_relative(source, out, layout, choice, dtype=arguments.dtype or "", **how)
        return f"{out}: {layout}: {said}"
    if arguments.dtype:
        raise UserError(f"--layout {layout} has the types that LVDM's code reads; leave --dtype out")
    verify = how.pop("writing").verify
    tensors = export_layout(source, out, layout, choice, verify=verify, **how)
    return f"{out}: {layout}, {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
