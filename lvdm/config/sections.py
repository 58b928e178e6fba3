"""The sections a run is made of. One YAML file is one run; a variant is one class in a union, told by ``kind``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from lvdm.config.base import NonNegativeInt, PositiveInt, Section, parse_value
from lvdm.config.models import ModelScopeUNetConfig, SpaceTimeUNetConfig, UNetConfig, VideoAutoencoderConfig
from lvdm.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Scaling = float | tuple[float, ...]
"""Scale or shift of latents: one for all channels or one a channel."""


class RunConfig(Section):
    """Where the run lives and how long it takes."""

    folder: str
    """Folder of the run: config, logs, checkpoints. One folder holds one run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the data order, of every draw about a sample and of the weights' initialisation."""
    resume: Literal["never", "auto", "must"] = "never"
    """What to do with a run that the folder already holds: refuse it, go on if there is one, or demand one."""
    init_from: str = ""
    """Exported or imported folder whose weights start this run; empty for none."""
    init_strict: bool = True
    """Whether all names and shapes of ``init_from`` must fit; if not, what fits is taken and the rest is reported."""
    steps: PositiveInt
    """Length of the run in optimiser steps."""
    log_every: PositiveInt = 10
    """Steps between lines of the log."""
    log_samples: bool = False
    """Whether ``seen/`` gets the position and a checksum of every sample that a step takes."""
    save_every: PositiveInt = 500
    """Steps between checkpoints; one more is written at the end."""
    checkpoints: str = ""
    """Folder or fsspec URL (``s3://...``) of the checkpoints; empty for ``checkpoints`` in ``folder``."""
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are deleted once a newer one is verified."""
    keep_every: NonNegativeInt = 0
    """The first checkpoint behind every multiple of so many samples is kept for good; 0 for none."""
    keep_best: NonNegativeInt = 0
    """Checkpoints kept for the best validation of the averaged weights: of the loss, or of an autoencoder's PSNR."""
    deterministic: bool = False
    """Whether torch must compute the same bits every time, and may be slower for it: on GPUs some sums otherwise depend
    on which thread comes first. Runs on CPUs do in any case."""
    stall_timeout: Annotated[float, Field(gt=0)] = 1800
    """Seconds without progress (a step, a start, a validation batch, a preview's sampler step; a checkpoint has more by
    its size) after which every rank prints its stacks and the run ends."""
    futile_starts: PositiveInt = 10
    """The run refuses to start after so many starts in a row that a kill or a fault ended before a new checkpoint: what
    requeues itself must have an end. A request to stop, a return from a spike or bad input begins the
    count anew."""


class BatchConfig(Section):
    """Batch arithmetic: ``size`` = ``micro`` x ranks x accumulation, checked before anything starts."""

    size: PositiveInt
    """Samples of one optimiser step over all ranks."""
    micro: PositiveInt
    """Samples of one forward and backward on one rank."""


class Bucket(Section):
    """One size of clips. A sample goes to the longest that it has frames for, and of those the nearest in shape."""

    frames: PositiveInt
    """Frames of a clip; 1 for images."""
    height: PositiveInt
    """Height in pixels."""
    width: PositiveInt
    """Width in pixels."""
    size: PositiveInt
    """Samples of a step of this size, in place of ``batch.size``; a micro-batch then has size x ``batch.micro`` /
    ``batch.size`` of them, so size must divide by ranks x accumulation."""


class ClipConfig(Section):
    """How a clip is cut out of a video."""

    frames: PositiveInt = 16
    """Frames of a clip."""
    height: PositiveInt = 256
    """Height of a clip in pixels."""
    width: PositiveInt = 256
    """Width of a clip in pixels."""
    stride: PositiveInt = 1
    """Video frames from one clip frame to the next."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Clip frames a second, in place of ``stride``: those of the video nearest in time."""
    min_frames: NonNegativeInt = 0
    """Frames that a video must have to be used at all; in any case as many as a clip takes."""
    start: Literal["random", "first", "center"] = "random"
    """Where in the video the clip starts."""
    resize: Literal["crop", "random_crop", "squash", "pad"] = "crop"
    """``crop``: scale the shorter side to fit, crop the centre; ``random_crop``: crop anywhere; ``squash``: scale both
    sides, ignoring the aspect; ``pad``: scale the longer side to fit, with black bars."""
    flip: Fraction = 0.0
    """Probability of mirroring a clip left to right."""
    buckets: tuple[Bucket, ...] = ()
    """Sizes of clips trained together, one of them a step; empty: ``frames``, ``height`` and ``width`` alone."""

    @property
    def sizes(self) -> list[ClipConfig]:
        """This config for each bucket, or itself."""
        sides = [{"frames": b.frames, "height": b.height, "width": b.width, "buckets": ()} for b in self.buckets]
        return [self.model_copy(update=update) for update in sides] or [self]

    @model_validator(mode="after")
    def _one_pace(self) -> ClipConfig:
        if self.fps is not None and self.stride != 1:
            raise ValueError("fps and stride both say how far clip frames lie apart: give one")
        return self


class Condition(Section):
    """What a field of the index must say for a sample to be used; a sample that says nothing passes ``!=`` alone.

    A text such as ``duration >= 2`` or ``language in en,de`` will do.
    """

    field: str
    """Name of a field of the samples' ``.json``, such as ``duration``; ``tools/inspect_shards.py`` lists them."""
    comparison: Literal["==", "!=", "<", "<=", ">", ">=", "in"]
    """How the field is held against the value; ``in``: it is one of several."""
    value: bool | float | str | tuple[float | str, ...]
    """Number, text or boolean, as the field is; a list for ``in``."""

    def __str__(self) -> str:
        return f"{self.field} {self.comparison} {self.value}"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        found = re.fullmatch(r"\s*([\w.]+)\s*(==|!=|<=|>=|<(?!=)|>(?!=)|\bin\b)\s*(\S.*?)\s*", given)
        if not found:
            raise ValueError(f"{given!r} is not of the form FIELD COMPARISON VALUE, such as 'duration >= 2'")
        name, comparison, text = found.groups()
        values = [_scalar(part.strip()) for part in (text.strip("[]").split(",") if comparison == "in" else [text])]
        return {"field": name, "comparison": comparison, "value": values if comparison == "in" else values[0]}

    @model_validator(mode="after")
    def _fits(self) -> Condition:
        if isinstance(self.value, tuple) != (self.comparison == "in"):
            raise ValueError(
                f"comparison {self.comparison} needs {'a list' if self.comparison == 'in' else 'one value'}"
            )
        return self


def _scalar(text: str) -> bool | float | str:
    """A number, text or boolean as YAML reads it. Raises `ValueError`."""
    try:
        value = parse_value(text)
    except UserError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, bool | int | float | str) or value in (math.inf, -math.inf) or value != value:
        raise ValueError(f"{text!r} is no number, text or boolean")
    return value


class ShardSet(Section):
    """Folders of indexed shards that are read as one set."""

    folders: Annotated[tuple[str, ...], Field(min_length=1)]
    """Any fsspec URLs."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Share of the samples that this set gives, in any unit; all sets have one, or none has and sizes decide."""
    where: tuple[Condition, ...] = ()
    """Conditions that a sample must meet."""
    join: tuple[str, ...] = ()
    """Folders with more members and fields of the same samples, under the same names of shards and keys; samples that
    one of them lacks are left out."""


# told apart by hand: pydantic would report the faults of a set once as a text that it is not
ShardEntry = Annotated[
    Annotated[str, Tag("<folder>")] | Annotated[ShardSet, Tag("<set>")],
    Discriminator(lambda entry: "<folder>" if isinstance(entry, str) else "<set>"),
]


def _one_way_of_mixing(shards: tuple[str | ShardSet, ...]) -> tuple[str | ShardSet, ...]:
    weighted = [isinstance(entry, ShardSet) and entry.weight is not None for entry in shards]
    if any(weighted) and not all(weighted):
        raise ValueError(f"entry {weighted.index(False)} has no weight, others have: give all one, or none")
    return shards


Shards = Annotated[tuple[ShardEntry, ...], Field(min_length=1), AfterValidator(_one_way_of_mixing)]


def shard_sets(shards: Sequence[str | ShardSet]) -> list[ShardSet]:
    """The sets that a ``shards`` setting names: folders given plainly are one set together."""
    plain = tuple(entry for entry in shards if isinstance(entry, str))
    sets = [entry for entry in shards if isinstance(entry, ShardSet)]
    return [*([ShardSet(folders=plain)] if plain else []), *sets]


def shard_folders(shards: Sequence[str | ShardSet]) -> list[str]:
    """All folders that a ``shards`` setting names, without those that are joined."""
    return [folder for one in shard_sets(shards) for folder in one.folders]


class VideoSource(Section):
    """Shards of videos with captions in video2dataset's layout."""

    shards: Shards
    """Folders (any fsspec URL) of indexed shards, read as one set, or sets with weights and conditions."""
    clip: ClipConfig = ClipConfig()
    """How clips are cut."""
    captions: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Where captions come from, with weights: ``txt`` is the file of that name, others are fields of the ``.json``, a
    text or a list of them. Each time one is drawn among those a sample has; a sample that has none trains without text.
    Empty: ``txt``, else ``caption``."""
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    """What decodes videos; TorchCodec needs to be installed, with FFmpeg."""

    @field_validator("captions")
    @classmethod
    def _some_caption(cls, captions: dict[str, float]) -> dict[str, float]:
        if captions and not any(captions.values()):
            raise ValueError("no weight is above 0; data.text_dropout=1 trains without text")
        return captions


class LatentSource(Section):
    """Shards of pre-encoded latents and text states, as ``tools/encode_latents.py`` writes them."""

    shards: Shards
    """Folders (any fsspec URL) of indexed latent shards, read as one set, or sets with weights and conditions."""


class DataConfig(Section):
    """What is read, in which order, by how many workers."""

    kind: Literal["video", "latents", "stream"]
    """``video``: decode indexed shards; ``latents``: read pre-encoded latents; ``stream``: webdataset's streaming
    pipeline over ``video.shards`` (no index needed, resume by whole shards)."""
    video: VideoSource | None = None
    """The video shards, for kinds ``video`` and ``stream``. For ``latents`` it says how they must have been encoded,
    with which weights captions are drawn, and the batch sizes of buckets."""
    latents: LatentSource | None = None
    """The latent shards, for kind ``latents``."""
    workers: NonNegativeInt = 2
    """Loader processes of one rank; 0 reads in the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches that each worker holds ready."""
    cache_gb: Annotated[float, Field(ge=0)] = 0.0
    """Gigabytes (10^9 bytes) of what was read from stores that a node keeps in its cache, ``$LVDM_CACHE``; 0: none."""
    shuffle: bool = True
    """Whether epochs are permuted; off reads in index order."""
    shuffle_mb: Annotated[float, Field(ge=0)] = 256.0
    """Megabytes (10^6 bytes) of encoded samples out of which each worker of a stream draws the next; 0 permutes its
    shards alone."""
    contiguous: PositiveInt = 1
    """Neighbours in a shard that stay together in the permutation, for stores that are slow at random reads."""
    text_dropout: Fraction = 0.1
    """Probability that a caption is replaced by the empty one, which classifier-free guidance needs."""
    max_bad_fraction: Fraction = 0.01
    """Fraction of samples that may be replaced because their bytes are bad before the run stops; of the first 1,000
    samples it is so many of a thousand."""

    @model_validator(mode="after")
    def _source_is_given(self) -> DataConfig:
        wanted = "latents" if self.kind == "latents" else "video"
        if getattr(self, wanted) is None:
            raise ValueError(f"kind={self.kind} needs the section data.{wanted}")
        return self

    @model_validator(mode="after")
    def _stream_has_no_index(self) -> DataConfig:
        if self.kind == "stream" and self.video is not None:
            given = {"data.video.clip.buckets": self.video.clip.buckets, "data.contiguous": self.contiguous > 1}
            for number, one in enumerate(self.video.shards):
                if isinstance(one, ShardSet):
                    given |= {f"data.video.shards.{number}.{name}": getattr(one, name) for name in ("where", "join")}
            needing = ", ".join(name for name, value in given.items() if value)
            if needing:
                raise ValueError(f"kind=stream reads without an index, which {needing} needs; use kind=video")
        return self


class OwnVAE(Section):
    """A frozen autoencoder that lvdm trained and exported."""

    kind: Literal["lvdm"]
    """Tells the class."""
    folder: str
    """Exported folder (``model.safetensors`` and ``config.json``)."""
    scaling: str = ""
    """JSON file with ``scale`` and ``shift``, such as the ``latents.json`` of encoded latents; empty: 1 and 0, with
    ``data.kind=latents`` those of its ``latents.json``."""


class DiffusersVAE(Section):
    """A frozen 2-D KL autoencoder of the diffusers library, applied to each frame."""

    kind: Literal["diffusers"]
    """Tells the class."""
    name: str
    """Folder or hub name."""
    subfolder: str = ""
    """Subfolder in it, such as ``vae``."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """The UNet sees ``scale * (latent + shift)``. By default Stable Diffusion's, 0.18215 and 0, with
    ``data.kind=latents`` those of its ``latents.json``."""
    shift: float | None = None
    """See ``scale``."""
    scaling: str = ""
    """JSON file with ``scale`` and ``shift``, in place of these."""

    @model_validator(mode="after")
    def _one_scaling(self) -> DiffusersVAE:
        if self.scaling and (self.scale is not None or self.shift is not None):
            raise ValueError("scaling names a file with scale and shift: leave these out")
        return self


VAEConfig = Annotated[OwnVAE | DiffusersVAE, Field(discriminator="kind")]


class TextEncoderConfig(Section):
    """A frozen text encoder of the transformers library (CLIP, T5, BERT-like)."""

    name: str
    """Folder, hub name, or ``package:NAME/PATH`` for a folder inside an installed Python package."""
    subfolder: str = ""
    """Subfolder in it, such as ``text_encoder``; its tokenizer is then looked for in ``tokenizer`` beside it."""
    max_length: PositiveInt = 77
    """Tokens kept of a caption."""
    mask_padding: bool = True
    """Whether cross-attention ignores padding. LVDM pads CLIP's 77 tokens and attends to all of them: false."""


class DiffusionConfig(Section):
    """The diffusion process and its training loss."""

    timesteps: PositiveInt = 1000
    """Steps of the forward process."""
    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    """Shape of the variances; ``scaled_linear``, LVDM's and Stable Diffusion's, is linear in the root of beta."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """First variance of the linear schedules."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    """Last variance of the linear schedules."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise (arXiv 2305.08891); not with ``eps``."""
    parameterization: Literal["eps", "v", "x0", "flow"] = "eps"
    """What the network predicts; ``flow`` is rectified flow and ignores the variances."""
    loss: Literal["l1", "l2"] = "l2"
    """Distance between prediction and target, averaged over C, T, H, W."""
    min_snr_gamma: Annotated[float, Field(ge=0)] = 0.0
    """Clamp of the signal-to-noise loss weight (arXiv 2303.09556); 0 weights all timesteps alike."""
    snr_floor: Annotated[float, Field(ge=0)] = 0.0
    """Least signal-to-noise loss weight (truncated SNR, arXiv 2202.00512, section 4), with ``min_snr_gamma`` above it:
    without one, the clamp gives the noisiest timesteps next to no weight, and what they settle is learnt late."""
    timestep_shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, training draws noisy times more often: u in 0..1 becomes s u / (1 + (s - 1) u) (arXiv 2403.03206, eq. 23
    has it for flow). Validation draws evenly."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.zero_terminal_snr and self.parameterization == "eps":
            raise ValueError("zero_terminal_snr needs parameterization v or x0: pure noise says nothing about eps")
        if self.parameterization == "flow" and (self.zero_terminal_snr or self.min_snr_gamma):
            raise ValueError("zero_terminal_snr and min_snr_gamma have no meaning with parameterization=flow")
        if self.snr_floor and self.snr_floor > self.min_snr_gamma:
            raise ValueError(f"snr_floor={self.snr_floor:g} needs a min_snr_gamma of at least as much")
        return self


class GivenFramesConfig(Section):
    """Frames that the network is given of a clip, to go on from or to fill in between (``lvdm/diffusion/masks.py``)."""

    predict: Fraction = 0.5
    """Probability that the first frames are given."""
    interpolate: Fraction = 0.0
    """Probability that both ends are given; in all other cases no frame is."""
    first: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Numbers of first frames to choose from for prediction."""
    every: NonNegativeInt = 0
    """Give every so many frames for interpolation, and not the ends alone; 0 for the ends."""
    noise_levels: NonNegativeInt = 250
    """Given frames are diffused to a step drawn from 0 to this many, exclusive; 0 leaves them clean. LVDM: 250."""
    label_without: Literal["none", "drawn"] = "none"
    """Label of a clip of which no frame is given: the one that means none, as in sampling, or, as LVDM trained, that of
    the level which was drawn and not used."""
    in_loss: bool = False
    """Whether the loss counts given frames too. LVDM: true."""

    @model_validator(mode="after")
    def _fits(self) -> GivenFramesConfig:
        if self.predict + self.interpolate > 1:
            raise ValueError(f"predict {self.predict} and interpolate {self.interpolate} are more than 1 together")
        return self


class ReconstructionConfig(Section):
    """Losses of the video autoencoder."""

    l1_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the mean absolute error of pixels in -1..1, LVDM's pixel loss."""
    l2_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of their mean squared error; some of it helps small coloured things to be learnt early."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-6
    """Weight of the KL divergence to the unit Gaussian (sum over a latent, mean over the batch). LVDM releases: 0."""


class OptimConfig(Section):
    """AdamW, its learning rate and the moving average of the weights."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate from the end of the warm-up to the end of the run."""
    final_lr_fraction: Fraction = 0.0
    """Learning rate at the end of the run over the peak; unused with ``constant``."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 for no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the moving average of the fp32 weights, warmed up as min(decay, (1+n)/(10+n)) at step n."""


class EngineConfig(Section):
    """How DeepSpeed spreads the work."""

    zero_stage: int = 2
    """ZeRO stage: 1 shards optimiser state, 2 gradients too, 3 weights too."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; masters, moments, EMA and gradient accumulation are always fp32."""
    offload_optimizer: bool = False
    """Keep masters and optimiser state in host memory (stages 2 and 3)."""
    activation_checkpointing: bool = True
    """Recompute the activations of blocks in the backward pass, which takes a third more time and much less memory."""
    checkpoint_every: PositiveInt = 1
    """Recompute every so many blocks only; the others keep their activations. 1: all."""

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, stage: int) -> int:
        if stage == 0:
            raise ValueError(
                "stage 0 is refused: there DeepSpeed steps on non-finite gradients and cannot accumulate bf16 ones in "
                "fp32; use 1, which does the same work on one rank"
            )
        if stage not in (1, 2, 3):
            raise ValueError(f"there is no ZeRO stage {stage}; use 1, 2 or 3")
        return stage

    @model_validator(mode="after")
    def _fits(self) -> EngineConfig:
        if self.offload_optimizer and self.zero_stage == 1:
            raise ValueError("offload_optimizer needs zero_stage 2 or 3")
        if self.checkpoint_every > 1 and not self.activation_checkpointing:
            raise ValueError("checkpoint_every needs activation_checkpointing")
        return self


class ValidationConfig(Section):
    """Loss on held-out samples, with the live and the averaged weights, at fixed noise."""

    shards: tuple[str, ...] = ()
    """Folders of the same kind as the training data; empty for no validation."""
    every: PositiveInt = 500
    """Steps between validations."""
    samples: PositiveInt = 64
    """Held-out samples used, the first ones of the index."""


class HealthConfig(Section):
    """What the run watches of itself, and what it does about it; ``docs/health.md``."""

    clip_sigmas: Annotated[float, Field(ge=0)] = 3.0
    """A gradient whose norm exceeds the running mean by more than so many standard deviations is clipped to there, even
    where ``optim.clip_grad_norm`` would let it pass; 0 for no such limit."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Decay of the running mean and variance of the norm, a step."""
    warmup_steps: PositiveInt = 100
    """Applied steps before the mean and deviation are trusted."""
    spike_factor: Annotated[float, Field(gt=1)] = 10.0
    """A norm of more than so many times the running mean is a spike, and so is one that is not finite."""
    spike_steps: NonNegativeInt = 5
    """After so many spikes in a row the run goes back to the newest checkpoint before them, and on without those steps'
    samples; 0: never."""
    rollbacks: NonNegativeInt = 3
    """How often a run may go back so; once more is an error."""
    check_every: PositiveInt = 100
    """Steps between comparisons of the ranks' weights and clocks; there is one before each checkpoint, too."""
    straggler: Annotated[float, Field(gt=1)] = 2.0
    """A rank that takes so many times as long as the median one is reported."""


class PreviewConfig(Section):
    """Clips sampled while training, with the averaged weights, to watch on TensorBoard and on the run page."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """A clip each; empty captions for a network that reads no text."""
    every: PositiveInt = 1000
    """Steps between previews; one more is sampled at the end."""
    steps: PositiveInt = 20
    """Sampler steps (DDIM, for flow Euler's)."""
    guidance: float = 5.0
    """Scale of classifier-free guidance, 1 for none."""
    fps: PositiveInt = 8
    """Frames a second of the clips."""


class TrainingConfig(Section):
    """What every training run has."""

    run: RunConfig
    """Where the run lives and how long it takes."""
    batch: BatchConfig
    """Batch arithmetic."""
    data: DataConfig
    """What is read."""
    optim: OptimConfig
    """Optimiser, learning rate and EMA."""
    engine: EngineConfig = EngineConfig()
    """How DeepSpeed spreads the work."""
    validation: ValidationConfig = ValidationConfig()
    """Loss on held-out samples."""
    health: HealthConfig = HealthConfig()
    """What the run watches of itself."""


class AutoencoderTraining(TrainingConfig):
    """Train the video autoencoder on video shards."""

    task: Literal["autoencoder"]
    """Tells the class."""
    model: VideoAutoencoderConfig
    """The autoencoder."""
    loss: ReconstructionConfig = ReconstructionConfig()
    """Its losses."""

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderTraining:
        if self.data.kind == "latents":
            raise ValueError("data.kind: the autoencoder trains on video or stream, not on latents")
        return self


class LatentDiffusionTraining(TrainingConfig):
    """Train a UNet in the latent space of a frozen VAE."""

    task: Literal["latent_diffusion"]
    """Tells the class."""
    model: UNetConfig
    """The denoising network."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Process and loss."""
    vae: VAEConfig
    """The frozen autoencoder."""
    text: TextEncoderConfig | None = None
    """The frozen text encoder, for a network that reads text."""
    given: GivenFramesConfig | None = None
    """Which frames are given, for a network with a mask channel."""
    preview: PreviewConfig | None = None
    """Clips sampled while training; none without this section."""
    latent_stride: PositiveInt = 1
    """The network sees every so many frames of a latent clip. LVDM's prediction model works on every fourth."""

    @model_validator(mode="after")
    def _fits(self) -> LatentDiffusionTraining:
        reads_text = not isinstance(self.model, SpaceTimeUNetConfig)
        if reads_text != (self.text is not None):
            raise ValueError(
                f"text: a {self.model.kind} {'needs' if reads_text else 'reads no text, so leave out'} this section"
            )
        if self.preview is not None:
            if self.given is not None:
                raise ValueError("preview: cannot sample a model of given frames; leave out this section")
            if not reads_text and any(self.preview.prompts):
                raise ValueError(f"preview.prompts: a {self.model.kind} reads no text; give empty captions")
        masked = isinstance(self.model, SpaceTimeUNetConfig) and self.model.mask_channel
        if masked != (self.given is not None):
            raise ValueError(f"given: {'needed by' if masked else 'useless without'} model.mask_channel")
        if self.given is not None and isinstance(self.model, SpaceTimeUNetConfig):
            levels = self.given.noise_levels
            labels = levels + 1 if levels else 0
            if self.model.noise_levels != labels:
                raise ValueError(f"model.noise_levels must be {labels} to go with given.noise_levels {levels}")
            if levels > self.diffusion.timesteps:
                raise ValueError(f"given.noise_levels {levels} exceed diffusion.timesteps {self.diffusion.timesteps}")
        if isinstance(self.model, ModelScopeUNetConfig) and self.model.frame_rate:
            raise ValueError("model.frame_rate: training batches carry no frame rates; set it to false")
        return self
