"""Strict, frozen config sections, and reading them from YAML plus dotted overrides.

defaults < YAML file < command line. Every fault of a config is reported at once, each with its dotted path and, for an
unknown key, the nearest valid name. Nothing here imports torch, so a typo costs well under a second.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lvdm.errors import UserError

S = TypeVar("S", bound="Section")
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all config sections: unknown keys are errors, values are frozen, every field carries a docstring."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 safe loader that reads ``1e-4`` as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested dict in the YAML file ``path`` after ``a.b=value`` overrides. Raises `UserError`."""
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse_config(schema: type[S], tree: Mapping[str, Any], source: str) -> S:
    """Validate a nested dict against ``schema``; ``source`` names it in error messages."""
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        faults = error.errors()
        # a list with a faulty entry is also said to be too short
        within = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
        faults = [fault for fault in faults if fault["type"] != "too_short" or fault["loc"] not in within]
        lines = [_describe(schema, fault) for fault in faults]
        listed = "\n".join(f"  {line}" for line in lines)
        raise UserError(f"{source}: {len(lines)} fault{'s' * (len(lines) > 1)} in the config\n{listed}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `UserError` naming the file, and the line of a syntax fault."""
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections, not {type(tree).__name__}")
    return tree


def parse_value(text: str) -> Any:
    """A value as YAML reads it: a number, a text, a list. Raises `UserError`."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not valid YAML") from None


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = parse_value(text)
    except UserError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    node[keys[-1]] = value


def _describe(schema: type[Section], fault: Any) -> str:
    """One pydantic error as ``dotted.path: what is wrong (did you mean ...)``."""
    path, parents = _walk(schema, fault["loc"])
    dotted = ".".join(path) or "(top level)"
    match fault["type"]:
        case "extra_forbidden":
            return f"{dotted}: unknown key{_nearest(path[-1], parents)}"
        case "missing":
            return f"{dotted}: required, but not given"
        case "union_tag_not_found":
            return f"{dotted}.{_discriminator(fault)}: required, but not given"
        case "union_tag_invalid":
            expected = fault["ctx"]["expected_tags"]
            return f"{dotted}.{_discriminator(fault)}: {fault['ctx']['tag']!r} is none of {expected}"
        case "too_short":
            return f"{dotted}: needs at least {fault['ctx']['min_length']} entry"
        case "tuple_type":
            return f"{dotted}: should be a list (got {fault['input']!r})"
        case "value_error":
            return f"{dotted}: {fault['ctx']['error']}"
        case _:
            return f"{dotted}: {fault['msg']} (got {fault['input']!r})"


def _discriminator(fault: Any) -> str:
    return str(fault["ctx"]["discriminator"]).strip("'")


def _walk(schema: type[Section], loc: Sequence[str | int]) -> tuple[list[str], set[str]]:
    """Dotted path of a pydantic location without its union tags, and the valid keys beside its last part."""
    path: list[str] = []
    sections: list[type[Section]] = [schema]
    names: set[str] = set()
    for part in loc:
        if str(part).startswith("<"):  # the tag of a union that is told apart by type
            continue
        tagged = [s for s in sections if len(sections) > 1 and part in _tags(s)]
        if tagged:
            sections = tagged
            continue
        path.append(str(part))
        if isinstance(part, int):  # of a list of sections
            continue
        names = {name for s in sections for name in s.model_fields}
        fields = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        sections = [found for annotation in fields for found in _sections_in(annotation)]
    return path, names


def _tags(section: type[Section]) -> set[Any]:
    return {
        tag
        for field in section.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for tag in typing.get_args(field.annotation)
    }


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _nearest(name: str, valid: set[str]) -> str:
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {matches[0]}?"
    return f"; valid here: {', '.join(sorted(valid))}" if valid else ""
