"""Train from a config: one YAML is one run.

deepspeed launch/train.py --config configs/quickstart_ae.yaml
deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml data.kind=video
torchrun --nproc-per-node 8 launch/train.py --config configs/t2v_256.yaml
srun python launch/train.py --config configs/t2v_256.yaml        (see slurm/)
python launch/train.py --config configs/t2v_256.yaml --check     (validate and stop, in under a second)
"""

from __future__ import annotations

import argparse
import faulthandler

from lvdm.config import load_training_config
from lvdm.engine.deepspeed_config import accumulation_steps
from lvdm.engine.environment import read_world
from lvdm.engine.signals import StopRequest
from lvdm.errors import command_line
from lvdm.train.run_folder import RunFolder

_START_TIMEOUT = 1800.0  # seconds


def main() -> None:
    """Everything that can be wrong with the command is said before torch is imported."""
    faulthandler.enable()
    # A file system that hangs does so in the imports already; the watchdog takes over in `train`.
    faulthandler.dump_traceback_later(_START_TIMEOUT, exit=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--check", action="store_true", help="validate the config and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the config")
    arguments = parser.parse_intermixed_args()
    with command_line("train"):
        config = load_training_config(arguments.config, arguments.overrides)
        if arguments.check:
            print(f"{arguments.config}: valid {config.task} run in {config.run.folder}")
            return
        accumulation_steps(config.batch, read_world().size)
        RunFolder(config).enter()
        stop = StopRequest()
        from lvdm.train.loop import train

        train(config, stop)


if __name__ == "__main__":
    main()
