"""Index folders of webdataset shards, which training needs: python tools/index_shards.py FOLDER [FOLDER ...]"""

from __future__ import annotations

import argparse

from lvdm.data.index import write_index
from lvdm.errors import command_line


def main() -> None:
    parser = argparse.ArgumentParser(description="Write index.arrow into folders of webdataset shards.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder of *.tar, or any fsspec URL of one")
    arguments = parser.parse_args()
    with command_line("index_shards"):
        for folder in arguments.folders:
            print(f"{folder}: {write_index(folder)} samples indexed")


if __name__ == "__main__":
    main()
