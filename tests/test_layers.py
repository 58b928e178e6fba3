"""The direction of imports: lower layers never import higher ones, and siblings leave each other alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    "errors": 0,
    "randomness": 0,
    "storage": 0,
    "attempts": 0,
    "synthetic": 0,
    "config": 0,
    "data": 1,
    "models": 1,
    "diffusion": 1,
    "weights": 1,
    "checkpoint": 1,
    "evaluation": 1,
    "media": 1,
    "clip_folder": 2,
    "engine": 2,
    "inference": 2,
    "train": 3,
    "jobs": 3,
}
DISTRIBUTED = ("deepspeed", "torch.distributed")


def test_lower_layers_never_import_higher_ones_and_siblings_leave_each_other_alone() -> None:
    wrong = []
    for file in (ROOT / "lvdm").rglob("*.py"):
        here = file.relative_to(ROOT / "lvdm").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for module in imports(file):
            parts = module.split(".")
            if parts[0] != "lvdm" or len(parts) == 1 or parts[1] == here:
                continue
            sibling = LEVELS[parts[1]] == LEVELS[here] and LEVELS[here] > 0
            if LEVELS[parts[1]] > LEVELS[here] or sibling:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_only_the_engine_imports_deepspeed_or_torch_distributed() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for folder in ("lvdm", "launch", "tools")
        for file in (ROOT / folder).rglob("*.py")
        if "engine" not in file.parts
        for module in imports(file)
        if module.startswith(DISTRIBUTED)
    ]
    assert wrong == []


def test_configs_need_no_torch_and_nothing_imports_a_main() -> None:
    for file in (ROOT / "lvdm").rglob("*.py"):
        found = set(imports(file))
        assert not any(module.split(".")[0] in {"launch", "tools", "tests"} for module in found), file
        if "config" in file.parts or file.name in {"errors.py", "run_folder.py", "environment.py"}:
            assert not any(module.split(".")[0] in {"torch", "deepspeed", "diffusers"} for module in found), file


def test_every_module_is_used() -> None:
    files = [file for folder in ("lvdm", "launch", "tools", "tests") for file in (ROOT / folder).rglob("*.py")]
    used = {module for file in files if "tests" not in file.parts for module in imports(file)}
    for file in (ROOT / "lvdm").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        assert any(module == name or module.startswith(name + ".") for module in used), f"nobody imports {name}"


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside functions; ``from a import b`` gives a and a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
