"""Whether latents were made as a config says: by which VAE and text encoder, of which clips and captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lvdm.config import LatentDiffusionTraining, OwnVAE, VideoSource
from lvdm.data.latent_sets import EncodedSet, size_of
from lvdm.data.latents import clip_settings
from lvdm.errors import UserError
from lvdm.inference import own_vae_weights
from lvdm.models.frozen import kept_fingerprint, known_fingerprint

Pair = tuple[str, Any, Any]
"""The name of a setting, what the config says of it, and what the latents say."""


def check_latent_set(
    config: LatentDiffusionTraining, sets: Sequence[EncodedSet], held_out: Sequence[EncodedSet] = ()
) -> list[str]:
    """Refuse latents that another VAE, text encoder or preprocessing made.

    A model that reads no text takes latents with any. Without ``data.video`` clips and captions may be any; of those
    held out for validation, clips always may.

    Returns:
        What could not be checked, for the log.
    Raises:
        UserError: naming the first setting that differs, with both values.
    """
    notes: list[str] = []
    video = config.data.video
    for one in (*sets, *held_out):
        pairs = [*_about_vae(config, one, notes), *_about_text(config, one, notes)]
        if video is not None:
            pairs += _about_captions(config, video, one)
            pairs += _about_clips(video, one) if one not in held_out else []
        _refuse(one.name, pairs)
    if video is not None:
        _refuse(", ".join(one.name for one in sets), _about_sizes(video, sets))
    return list(dict.fromkeys(notes))


def _refuse(name: str, pairs: Iterable[Pair]) -> None:
    for setting, wanted, found in pairs:
        if wanted != found:
            raise UserError(f"the latents in {name} were made with another {setting}: {found}, not {wanted}")


def _about_vae(config: LatentDiffusionTraining, one: EncodedSet, notes: list[str]) -> Iterator[Pair]:
    made = one.info.vae
    assert made is not None
    yield "vae.kind", config.vae.kind, made.kind
    if isinstance(config.vae, OwnVAE):
        yield "weights of vae.folder (SHA-256)", kept_fingerprint(*own_vae_weights(config.vae)), made.sha256
        return
    try:
        yield f"weights of vae.name {config.vae.name} (SHA-256)", known_fingerprint(config.vae), made.sha256
    except UserError as error:
        notes.append(f"the VAE of the latents is compared by its name alone: {error}")
        yield "vae.name", config.vae.name, made.name


def _about_text(config: LatentDiffusionTraining, one: EncodedSet, notes: list[str]) -> Iterator[Pair]:
    if config.text is None:
        return
    made = one.info.text
    if made is None:
        yield "text.name", config.text.name, "none"
        return
    yield "text.max_length", config.text.max_length, made.max_length
    yield "text.mask_padding", config.text.mask_padding, made.mask_padding
    try:
        yield f"weights of text.name {config.text.name} (SHA-256)", known_fingerprint(config.text), made.sha256
    except UserError as error:
        notes.append(f"the text encoder of the latents is compared by its name alone: {error}")
        yield "text.name", config.text.name, made.name


def _about_captions(config: LatentDiffusionTraining, video: VideoSource, one: EncodedSet) -> Iterator[Pair]:
    """Places may be fewer than were encoded."""
    if config.text is None:
        return
    wanted, found = (
        [name for name, weight in given.items() if weight > 0] for given in (video.captions, one.info.captions)
    )
    if not set(wanted) <= set(found) or bool(wanted) != bool(found):
        yield "data.video.captions", ", ".join(wanted) or "none", ", ".join(found) or "none"


def _about_clips(video: VideoSource, one: EncodedSet) -> Iterator[Pair]:
    yield "data.video.decoder", video.decoder, one.info.decoder
    found = clip_settings(one.info.clip)
    for name, value in clip_settings(video.clip).items():
        if name not in ("buckets", "frames", "height", "width"):
            yield f"data.video.clip.{name}", value, found[name]


def _about_sizes(video: VideoSource, sets: Sequence[EncodedSet]) -> Iterator[Pair]:
    """Sizes of the sets together: each may have been encoded into a folder of its own."""
    wanted = sorted(size_of(size) for size in video.clip.sizes)
    found = sorted({size for one in sets for size in one.shapes})
    if len(wanted) == len(found) == 1:
        for number, name in enumerate(("frames", "height", "width")):
            yield f"data.video.clip.{name}", wanted[0][number], found[0][number]
        return
    listed = [", ".join("x".join(map(str, size)) for size in sizes) for sizes in (wanted, found)]
    yield "data.video.clip.buckets", listed[0], listed[1]
