"""Which folders of pre-encoded latents a run reads, what from which, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lvdm.config import ClipConfig, Condition, Scaling, ShardSet, shard_sets
from lvdm.data.latents import (
    INFO_NAME,
    LatentSetInfo,
    content_settings,
    first_difference,
    read_latent_set,
)
from lvdm.errors import UserError
from lvdm.storage import Missing

Size = tuple[int, int, int]
"""Frames, height and width of a clip."""


@dataclass(frozen=True)
class EncodedSet:
    """One set of latent shards, of which each kind of content comes from one place."""

    name: str
    """The folder it is called by."""
    info: LatentSetInfo
    """What is read: the latents of one place and the text of another."""
    shapes: dict[Size, tuple[int, int, int, int]]
    """C, T, H, W of the latents by size of clip."""
    latents: int
    """Where moments are: 0 in the folders of the set, n in the n-th that is joined to them."""
    text: int | None
    """Where text states are; None where there are none."""
    text_folder: str
    """A folder with the states of the empty caption; empty where there are none."""
    scalings: dict[str, tuple[Scaling, Scaling]]
    """Scale and shift by folder with latents."""

    def where(self, clip: ClipConfig) -> tuple[Condition, ...]:
        """Conditions that samples of a size of clip meet."""
        fields = {"clip_frames": clip.frames, "clip_height": clip.height, "clip_width": clip.width}
        return tuple(Condition(field=name, comparison="==", value=value) for name, value in fields.items())


def open_latent_sets(shards: Sequence[str | ShardSet]) -> list[EncodedSet]:
    """The sets that a ``shards`` setting names; of folders that are joined, the last with text is the only one whose
    text is read, and the last with latents the only one whose latents are.

    Raises:
        UserError: a folder holds no latents, there are none in a set, or two folders cannot be trained on together,
            naming the first setting in which they differ.
        Requeue: a store does not answer.
    """
    sets = [_open(one) for one in shard_sets(shards)]
    for other in sets[1:]:
        _check_alike(sets[0].name, sets[0].info, other.name, other.info, ("vae", "text", "clip"))
    return sets


def sizes_to_read(sets: Sequence[EncodedSet], clip: ClipConfig | None) -> list[ClipConfig]:
    """The sizes of clip that a run reads: those of ``clip``, or the only one there is.

    Raises:
        UserError: there are no latents of such a size, or of several and nothing tells which.
    """
    known = {size for one in sets for size in one.shapes}
    listed = ", ".join("x".join(map(str, size)) for size in sorted(known))
    where = ", ".join(one.name for one in sets)
    if clip is None:
        if len(known) > 1:
            raise UserError(
                f"{where} holds latents of clips of several sizes ({listed}): name them with their batch sizes in "
                f"data.video.clip.buckets"
            )
        return [size for size in sets[0].info.clip.sizes if size_of(size) in known][:1]
    for size in clip.sizes:
        if size_of(size) not in known:
            raise UserError(
                f"data.video.clip: {where} holds no latents of clips of "
                f"{'x'.join(map(str, size_of(size)))}, but of {listed}"
            )
    return clip.sizes


def shapes_of(sets: Sequence[EncodedSet], sizes: Sequence[ClipConfig]) -> list[tuple[int, int, int, int]]:
    """C, T, H, W of the latents of sizes that the sets have."""
    shapes = {size: shape for one in sets for size, shape in one.shapes.items()}
    return [shapes[size_of(size)] for size in sizes]


def scaling_of(sets: Sequence[EncodedSet]) -> tuple[Scaling, Scaling]:
    """The scale and shift of all sets. Raises `UserError` if they differ."""
    (first, scaling), *others = [item for one in sets for item in one.scalings.items()]
    for folder, other in others:
        if other != scaling:
            raise UserError(
                f"the scale and shift of {first} are {scaling[0]} and {scaling[1]}, those of {folder} {other[0]} and "
                f"{other[1]}: name the {INFO_NAME} whose shall hold with vae.scaling"
            )
    return scaling


def size_of(clip: ClipConfig) -> Size:
    """The size of a clip, buckets aside."""
    return clip.frames, clip.height, clip.width


def _open(one: ShardSet) -> EncodedSet:
    infos = [read_latent_set(folder) for folder in one.folders]
    for folder, info in zip(one.folders[1:], infos[1:], strict=True):
        _check_alike(one.folders[0], infos[0], folder, info, ("vae", "text", "clip", "captions"))
    # a joined folder may have other members and fields alone, such as scores
    parts = [infos, *(_if_there(folder) for folder in one.join)]
    with_latents = [number for number, part in enumerate(parts) if part and part[0].vae]
    with_text = [number for number, part in enumerate(parts) if part and part[0].text]
    if not with_latents:
        raise UserError(
            f"{one.folders[0]} holds text states alone; name the folder of the latents, and this one in its join"
        )
    latents, text = parts[with_latents[-1]], parts[with_text[-1]] if with_text else None
    latent_folders = [one.folders, *((folder,) for folder in one.join)][with_latents[-1]]
    info = latents[0].model_copy(
        update={"text": text[0].text, "captions": text[0].captions} if text else {"text": None, "captions": {}}
    )
    return EncodedSet(
        name=one.folders[0],
        info=info,
        shapes={
            size_of(size): shape for part in latents for size, shape in zip(part.clip.sizes, part.shapes, strict=True)
        },
        latents=with_latents[-1],
        text=with_text[-1] if with_text else None,
        text_folder=[one.folders[0], *one.join][with_text[-1]] if with_text else "",
        scalings={folder: (part.scale, part.shift) for folder, part in zip(latent_folders, latents, strict=True)},
    )


def _if_there(folder: str) -> list[LatentSetInfo]:
    try:
        return [read_latent_set(folder)]
    except Missing:
        return []


def _check_alike(name: str, info: LatentSetInfo, other_name: str, other: LatentSetInfo, parts: tuple[str, ...]) -> None:
    """Refuse folders whose settings differ in one of ``parts``; sizes of clips may."""
    free = ("clip.buckets", "clip.frames", "clip.height", "clip.width")
    one, two = (
        {key: value for key, value in content_settings(given).items() if key.split(".")[0] in parts and key not in free}
        for given in (info, other)
    )
    difference = first_difference(one, two)
    if difference:
        raise UserError(f"{name} and {other_name} cannot be trained on together: {INFO_NAME} differs in {difference}")
