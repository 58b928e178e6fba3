"""Show a run's config with every default filled in, or the reference of all settings.

python tools/show_config.py configs/t2v_256.yaml batch.size=128
python tools/show_config.py --reference > docs/config.md
"""

from __future__ import annotations

import argparse

from lvdm.errors import UserError, command_line


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--reference", action="store_true", help="print the reference of all settings as Markdown")
    arguments = parser.parse_args()
    with command_line("show_config"):
        if arguments.reference:
            from lvdm.config.reference import reference

            print(reference(), end="")
        elif arguments.config:
            from lvdm.config import dump_yaml, load_training_config

            print(dump_yaml(load_training_config(arguments.config, arguments.overrides)), end="")
        else:
            raise UserError("give a config to show, or --reference")


if __name__ == "__main__":
    main()
