"""Small models of other projects for the tests of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast


def no_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """Give every weight a value that matters, those that start at zero too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def unet3d() -> UNet3DConditionModel:
    """ModelScope's shape, tiny."""
    model = UNet3DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=24, down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return no_zeros(model)


@pytest.fixture(scope="session")
def unet2d() -> UNet2DConditionModel:
    """Stable Diffusion 1.x's shape, tiny: four levels, eight heads on each, convolutions around the transformers."""
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64, 64), layers_per_block=2, norm_num_groups=32,
        attention_head_dim=8, cross_attention_dim=24,
    )  # fmt: skip
    return no_zeros(model)


@pytest.fixture(scope="session")
def pipeline_parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny autoencoder, text encoder and tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    no_zeros(
        AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    ).save_pretrained(folder / "vae")  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=2, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    no_zeros(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    words = {word: i for i, word in enumerate(["[UNK]", "[END]", "a", "red", "circle"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[END]", eos_token="[END]", unk_token="[UNK]", model_max_length=12
    ).save_pretrained(folder / "tokenizer")
    return {name: folder / name for name in ("vae", "text_encoder", "tokenizer")}
