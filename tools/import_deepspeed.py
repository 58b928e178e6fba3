"""Go on from a checkpoint that DeepSpeed itself wrote (ZeRO stages 1 to 3): masters, moments and step become a run.

    python tools/import_deepspeed.py old_run/checkpoints runs/new --config configs/t2v_256.yaml --trust
    deepspeed launch/train.py --config configs/t2v_256.yaml run.folder=runs/new run.resume=must

The config describes the model and the run that goes on. The average of the weights, which DeepSpeed does not keep,
starts as the weights. DeepSpeed's files are pickles; their reader admits tensors, dicts and the few classes that those
files need, and runs nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lvdm.config import AnyTraining, load_training_config
from lvdm.errors import command_line


def main() -> None:
    """Parse and import with a progress bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of DeepSpeed's save_checkpoint, or of one tag in it")
    parser.add_argument("out", type=Path, help="new run folder")
    parser.add_argument("--config", required=True, help="YAML file of the run that goes on")
    parser.add_argument("--trust", action="store_true", help="the pickles come from a source that you know")
    parser.add_argument("--tag", default="", help="which checkpoint; by default the one that 'latest' names")
    parser.add_argument("--prefix", default="", help="take only parameters whose names begin so, and drop it from them")
    parser.add_argument("--weights-only", action="store_true", help="leave the moments; the optimiser starts anew")
    parser.add_argument(
        "--without-data", action="store_true", help="do not look at data and autoencoder; exports then lack their scale"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the config")
    arguments = parser.parse_intermixed_args()
    with command_line("import_deepspeed"):
        config = load_training_config(arguments.config, arguments.overrides)
        from lvdm.jobs.import_deepspeed import import_deepspeed
        from lvdm.jobs.progress import megabytes, progress_line

        with progress_line("importing", "MB") as line:
            done = import_deepspeed(
                arguments.source,
                arguments.out,
                config,
                trust=arguments.trust,
                tag=arguments.tag,
                prefix=arguments.prefix,
                weights_only=arguments.weights_only,
                facts=None if arguments.without_data else lambda: facts_of(config),
                progress=megabytes(line),
            )
        print(
            f"{done.location}: step {done.step} of DeepSpeed {done.version}, ZeRO-{done.stage} on {done.ranks} "
            f"rank{'s' * (done.ranks > 1)}, {done.parameters / 1e6:.2f} M parameters, {', '.join(done.kinds)}"
        )


def facts_of(config: AnyTraining) -> dict[str, Any]:
    """What sampling needs beyond the config, as training finds it out. Raises `UserError`."""
    import torch

    from lvdm.config import AutoencoderTraining
    from lvdm.train.autoencoder import AutoencoderTask
    from lvdm.train.latent_diffusion import LatentDiffusionTask

    if isinstance(config, AutoencoderTraining):
        return AutoencoderTask(config, torch.device("cpu"), torch.float32).facts()
    return LatentDiffusionTask(config, torch.device("cpu"), torch.float32).facts()


if __name__ == "__main__":
    main()
