"""Small networks for the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lvdm.config import ModelScopeUNetConfig, TextUNetConfig, VideoAutoencoderConfig
from lvdm.models.build import build_model
from lvdm.models.unet_modelscope import ModelScopeUNet
from lvdm.models.unet_st import SpaceTimeUNet
from lvdm.models.unet_text import TextUNet
from lvdm.models.video_autoencoder import VideoAutoencoder
from tests.models.formula import (
    fill_by_formula,
    lvdm_autoencoder_key,
    lvdm_space_time_unet_key,
    lvdm_text_unet_key,
)


@pytest.fixture
def autoencoder() -> VideoAutoencoder:
    """Weights by formula: none of them zero."""
    model = build_model(VideoAutoencoderConfig(hidden_channels=16, downsample=(2, 4, 4)), seed=0)
    fill_by_formula(model, lvdm_autoencoder_key)
    assert isinstance(model, VideoAutoencoder)
    return model


@pytest.fixture
def unet() -> TextUNet:
    """Weights by formula: none of them zero."""
    config = TextUNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        res_blocks=1,
        attention_levels=(0, 1),
        heads=4,
        context_dim=24,
        temporal_length=4,
    )
    model = build_model(config, seed=0)
    fill_by_formula(model, lvdm_text_unet_key)
    assert isinstance(model, TextUNet)
    return model


@pytest.fixture
def space_time_unet() -> SpaceTimeUNet:
    """The frame-conditioned network with the released models' relative keys; weights by formula."""
    model = SpaceTimeUNet(
        model_channels=32, channel_mult=(1, 2), res_blocks=1, attention_levels=(1,), heads=4,
        relative_keys="transposed", mask_channel=True, noise_levels=251,
    )  # fmt: skip
    fill_by_formula(model, lvdm_space_time_unet_key)
    return model


@pytest.fixture
def modelscope() -> ModelScopeUNet:
    """Weights by formula: none of them zero."""
    config = ModelScopeUNetConfig(
        channels=(32, 64), res_blocks=1, attention_levels=(0,), head_channels=8, context_dim=24, norm_groups=8
    )
    model = build_model(config, seed=0)
    fill_by_formula(model, lambda name: name)
    assert isinstance(model, ModelScopeUNet)
    return model


def _tokenizer(pad: str) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[END]", "[UNK]", "a", "red", "blue", "circle", "moves", "left"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="[END]", unk_token="[UNK]")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP text encoder and its tokenizer (padding with the end token, as OpenAI's does) side by side."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=2, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    _tokenizer("[END]").save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A tiny T5 with its decoder, and its tokenizer in one folder."""
    folder = tmp_path_factory.mktemp("t5")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=9, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, eos_token_id=1, pad_token_id=0,
            decoder_start_token_id=0,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer("[PAD]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny 2-D autoencoder of diffusers that shrinks by 2."""
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).save_pretrained(folder / "vae")  # fmt: skip
    return folder
