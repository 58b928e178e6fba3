"""The reference of all settings as Markdown, made from the sections' own docstrings."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from lvdm.config.base import Section
from lvdm.config.sections import AutoencoderTraining, LatentDiffusionTraining

_SIGNS: dict[type, tuple[str, str]] = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}


def reference() -> str:
    """Every setting of both tasks: its dotted path, what it may be, its default and its meaning."""
    parts = [
        "# Every setting\n",
        "One YAML is one run. Defaults, then the YAML file, then `section.key=value` on the command line. This page is",
        "written by `python tools/show_config.py --reference` from the docstrings in `lvdm/config`.\n",
    ]
    shared = [name for name in AutoencoderTraining.model_fields if name in LatentDiffusionTraining.model_fields]
    common = [name for name in shared if name not in ("task", "model")]
    parts += _chapter("Both tasks", AutoencoderTraining, common)
    parts += _chapter("`task: autoencoder`", AutoencoderTraining, ["model", "loss"])
    own = [name for name in LatentDiffusionTraining.model_fields if name not in (*common, "task")]
    parts += _chapter("`task: latent_diffusion`", LatentDiffusionTraining, own)
    return "\n".join(parts) + "\n"


def _chapter(title: str, root: type[Section], names: list[str]) -> Iterator[str]:
    yield f"## {title}\n"
    plain = [name for name in names if not _sections_of(root.model_fields[name])]
    if plain:
        yield from _table(root, "", plain)
    for name in names:
        for section in _sections_of(root.model_fields[name]):
            yield from _section(name, section, root.model_fields[name])


def _section(path: str, section: type[Section], field: FieldInfo) -> Iterator[str]:
    kind = section.model_fields.get("kind")
    tag = typing.get_args(kind.annotation)[0] if kind is not None and len(_sections_of(field)) > 1 else ""
    yield f"### `{path}`{f', kind `{tag}`' if tag else ''}\n"
    yield _one_line(section.__doc__ or "") + (" Optional." if _may_be_none(field) else "") + "\n"
    plain = [name for name, inner in section.model_fields.items() if not _sections_of(inner)]
    yield from _table(section, f"{path}.", plain)
    for name, inner in section.model_fields.items():
        for nested in _sections_of(inner):
            yield from _section(f"{path}.{name}", nested, inner)


def _table(section: type[Section], prefix: str, names: list[str]) -> Iterator[str]:
    yield "| setting | value | default | meaning |\n| --- | --- | --- | --- |"
    for name in names:
        field = section.model_fields[name]
        meaning = _one_line(field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {_allowed(field)} | {_default(field)} | {meaning} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.get_default(call_default_factory=True):
        case None:
            return "none"
        case "":
            return "empty"
        case bool(value):
            return str(value).lower()
        case dict(entries):
            return f"`{entries}`" if entries else "empty"
        case tuple(values):
            return f"`{list(values)}`"
        case value:
            return f"`{value}`"


def _allowed(field: FieldInfo) -> str:
    limits = [text for item in field.metadata for text in _limits(item)]
    return " ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [
            text for item in arguments[1:] for part in getattr(item, "metadata", [item]) for text in _limits(part)
        ]
        return " ".join([_type(arguments[0]), *limits])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type(inner) for inner in arguments if inner is not NoneType)
    if origin in (tuple, list):
        inner = [_type(item) for item in arguments if item is not Ellipsis]
        return f"list of {inner[0]}" if len(inner) == 1 else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _limits(item: Any) -> Iterator[str]:
    if type(item) in _SIGNS:
        sign, attribute = _SIGNS[type(item)]
        limit = getattr(item, attribute)
        yield f"{sign} {'2^63' if limit == 2**63 else limit}"
    elif isinstance(item, MinLen):
        yield f"(at least {item.min_length})"


def _may_be_none(field: FieldInfo) -> bool:
    return NoneType in typing.get_args(field.annotation)


def _sections_of(field: FieldInfo) -> list[type[Section]]:
    def walk(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for argument in typing.get_args(annotation):
            yield from walk(argument)

    return list(walk(field.annotation))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")
