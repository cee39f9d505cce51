"""Sizes of the frozen encoders: from the model's own config.json where it is local, else from a table.

Plain JSON is read, without transformers, so that a login node can do it. A model that is neither here
nor in the table stays unknown: a guess from its name would look like a number and be none.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple


class Transformer(NamedTuple):
    """What fixes the matrix products of a transformer's blocks."""

    width: int
    depth: int
    hidden: int
    """Hidden units of the MLP."""
    attention: int
    """Width of all queries together, heads × channels per head."""
    key_value: int
    """Width of all keys together; smaller where heads share them."""
    gated: bool = False
    """Three matrices in the MLP instead of two."""
    special_tokens: int = 0
    """CLS and trained registers before the patches of an image."""


class Autoencoder(NamedTuple):
    """What fixes the convolutions of the encoder half of diffusers' `AutoencoderKL`."""

    widths: tuple[int, ...]
    """Channels of each resolution, the finest first."""
    blocks: int
    """Residual blocks at each resolution."""
    latent_channels: int
    attention: bool = True
    """Attention at the coarsest resolution."""
    quantizer: bool = True
    """A 1×1 convolution after the encoder."""


class UnknownModel(Exception):
    """Nothing is known of a model's sizes; the text says why."""


def _vit(width: int, depth: int, hidden: int = 0, *, special_tokens: int = 0) -> Transformer:
    hidden = hidden or 4 * width
    return Transformer(width, depth, hidden, width, width, special_tokens=special_tokens)


def _decoder(
    width: int, depth: int, hidden: int, *, heads: int, shared: int, channels: int
) -> Transformer:
    """A language model with `shared` key-value heads of `channels` each."""
    return Transformer(width, depth, hidden, heads * channels, shared * channels, gated=True)


def _t5(width: int, depth: int, hidden: int, *, attention: int, gated: bool) -> Transformer:
    return Transformer(width, depth, hidden, attention, attention, gated=gated)


def _gated_t5() -> dict[str, Transformer]:
    sizes = {
        "small": (512, 8, 1024, 384),
        "base": (768, 12, 2048, 768),
        "large": (1024, 24, 2816, 1024),
        "xl": (2048, 24, 5120, 2048),
        "xxl": (4096, 24, 10240, 4096),
    }
    return {
        f"google/{family}-{size}": _t5(width, depth, hidden, attention=attention, gated=True)
        for size, (width, depth, hidden, attention) in sizes.items()
        for family in ("t5-v1_1", "flan-t5")
    }


_DINOV2_G = Transformer(1536, 40, 4096, 1536, 1536, gated=True)
_SIGLIP2 = {
    "google/siglip2-base-patch16-256": _vit(768, 12),
    "google/siglip2-large-patch16-256": _vit(1024, 24),
    "google/siglip2-so400m-patch14-224": _vit(1152, 27, 4304),
    "google/siglip2-so400m-patch16-256": _vit(1152, 27, 4304),
}
"""Both towers have the same sizes."""

KNOWN_IMAGE_MODELS: dict[str, Transformer] = {
    "facebook/dinov2-small": _vit(384, 12, special_tokens=1),
    "facebook/dinov2-base": _vit(768, 12, special_tokens=1),
    "facebook/dinov2-large": _vit(1024, 24, special_tokens=1),
    "facebook/dinov2-giant": _DINOV2_G._replace(special_tokens=1),
    "facebook/dinov2-with-registers-small": _vit(384, 12, special_tokens=5),
    "facebook/dinov2-with-registers-base": _vit(768, 12, special_tokens=5),
    "facebook/dinov2-with-registers-large": _vit(1024, 24, special_tokens=5),
    "facebook/dinov2-with-registers-giant": _DINOV2_G._replace(special_tokens=5),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _vit(384, 12, special_tokens=5),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _vit(768, 12, special_tokens=5),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _vit(1024, 24, special_tokens=5),
    **_SIGLIP2,
    "facebook/vit-mae-base": _vit(768, 12, special_tokens=1),
    "facebook/vit-mae-large": _vit(1024, 24, special_tokens=1),
    "facebook/vit-mae-huge": _vit(1280, 32, special_tokens=1),
}
"""Published image encoders."""

_QWEN2_5, _QWEN3, _GEMMA2, _GEMMA3 = ("", "-Instruct"), ("", "-Base"), ("", "-it"), ("-pt", "-it")
"""Ends of the names under which one size is published, before and after fine-tuning."""

_LANGUAGE_MODELS: dict[str, tuple[tuple[str, str], Transformer]] = {
    "Qwen/Qwen2.5-0.5B": (_QWEN2_5, _decoder(896, 24, 4864, heads=14, shared=2, channels=64)),
    "Qwen/Qwen2.5-1.5B": (_QWEN2_5, _decoder(1536, 28, 8960, heads=12, shared=2, channels=128)),
    "Qwen/Qwen2.5-3B": (_QWEN2_5, _decoder(2048, 36, 11008, heads=16, shared=2, channels=128)),
    "Qwen/Qwen2.5-7B": (_QWEN2_5, _decoder(3584, 28, 18944, heads=28, shared=4, channels=128)),
    "Qwen/Qwen3-0.6B": (_QWEN3, _decoder(1024, 28, 3072, heads=16, shared=8, channels=128)),
    "Qwen/Qwen3-1.7B": (_QWEN3, _decoder(2048, 28, 6144, heads=16, shared=8, channels=128)),
    "Qwen/Qwen3-4B": (_QWEN3, _decoder(2560, 36, 9728, heads=32, shared=8, channels=128)),
    "google/gemma-2-2b": (_GEMMA2, _decoder(2304, 26, 9216, heads=8, shared=4, channels=256)),
    "google/gemma-3-1b": (_GEMMA3, _decoder(1152, 26, 6912, heads=4, shared=1, channels=256)),
    "google/gemma-3-4b": (_GEMMA3, _decoder(2560, 34, 10240, heads=8, shared=4, channels=256)),
}

KNOWN_TEXT_MODELS: dict[str, Transformer] = {
    **{f"{name}{end}": sizes for name, (ends, sizes) in _LANGUAGE_MODELS.items() for end in ends},
    "google-t5/t5-small": _t5(512, 6, 2048, attention=512, gated=False),
    "google-t5/t5-base": _t5(768, 12, 3072, attention=768, gated=False),
    "google-t5/t5-large": _t5(1024, 24, 4096, attention=1024, gated=False),
    "google-t5/t5-3b": _t5(1024, 24, 16384, attention=4096, gated=False),
    "google-t5/t5-11b": _t5(1024, 24, 65536, attention=16384, gated=False),
    **_gated_t5(),
    "openai/clip-vit-large-patch14": _vit(768, 12),
    **_SIGLIP2,
    "sentence-transformers/all-MiniLM-L6-v2": _vit(384, 6),
}
"""Published text models; of CLIP and SigLIP2 their text towers."""

KNOWN_AUTOENCODERS: dict[str, Autoencoder] = {
    name: Autoencoder((128, 256, 512, 512), 2, 4)
    for name in (
        "stabilityai/sd-vae-ft-mse",
        "stabilityai/sd-vae-ft-ema",
        "stabilityai/sdxl-vae",
    )
}
"""Published KL autoencoders."""

_TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "gemma3": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
}
"""transformers leaves out of a tower's part of config.json whatever is its own default."""

_PLAIN = {
    "bert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "clip",
    "clip_text_model",
    "siglip",
    "siglip_text_model",
}
_GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"}
_T5 = {"t5", "mt5", "umt5"}


def image_transformer(model: str, known_as: str) -> Transformer:
    """Sizes of an image encoder. Raises UnknownModel."""
    config = _local_config(model)
    if config is not None:
        return _read(_image_from_config, model, config)
    return _from_table(KNOWN_IMAGE_MODELS, known_as)


def text_transformer(model: str) -> Transformer:
    """Sizes of a text encoder; of models with two towers, of the text tower. Raises UnknownModel."""
    config = _local_config(model)
    if config is not None:
        return _read(_text_from_config, model, config)
    return _from_table(KNOWN_TEXT_MODELS, model)


def autoencoder(model: str) -> Autoencoder:
    """Sizes of a KL autoencoder. Raises UnknownModel."""
    config = _local_config(model)
    if config is not None:
        return _read(_autoencoder_from_config, model, config)
    return _from_table(KNOWN_AUTOENCODERS, model)


def _from_table(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise UnknownModel(f"{name} is neither a local directory nor in the table of known sizes")
    return table[name]


def _local_config(model: str) -> dict[str, Any] | None:
    """The config.json beside local weights; None for a hub name. Raises UnknownModel."""
    if model.startswith("package:"):
        package, _, path = model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UnknownModel(f"{model}: the package {package} is not installed")
        directory = Path(next(iter(spec.submodule_search_locations))) / path
    else:
        directory = Path(model).expanduser()
        if not directory.is_dir():
            return None
    try:
        content = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{model} has no readable config.json") from error
    if not isinstance(content, dict):
        raise UnknownModel(f"{model} has a config.json that is no object")
    return content


def _read(parse: Any, model: str, config: dict[str, Any]) -> Any:
    try:
        return parse(config)
    except KeyError as error:
        raise UnknownModel(f"the config.json of {model} lacks {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UnknownModel(f"the config.json of {model} cannot be read: {error}") from error
    except UnknownModel as error:
        raise UnknownModel(f"{model}: {error}") from error


def _tower(config: dict[str, Any], part: str) -> dict[str, Any]:
    """The sizes of one tower of a model that has two, or those of the model itself."""
    if part not in config:
        return config
    return _TOWER_DEFAULTS.get(config["model_type"], {}) | config[part]


def _image_from_config(config: dict[str, Any]) -> Transformer:
    kind = config["model_type"]
    sizes = _tower(config, "vision_config")
    width, depth = sizes["hidden_size"], sizes["num_hidden_layers"]
    match kind:
        case "dinov2" | "dinov2_with_registers":
            hidden, gated = int(width * sizes["mlp_ratio"]), sizes["use_swiglu_ffn"]
            if gated:
                hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
            special = 1 + sizes.get("num_register_tokens", 0)
        case "dinov3_vit":
            hidden, gated = sizes["intermediate_size"], sizes["use_gated_mlp"]
            special = 1 + sizes["num_register_tokens"]
        case "siglip" | "siglip_vision_model":
            hidden, gated, special = sizes["intermediate_size"], False, 0
        case "vit_mae":
            hidden, gated, special = sizes["intermediate_size"], False, 1
        case _:
            raise UnknownModel(f"image encoders of type {kind} are not known")
    return Transformer(width, depth, hidden, width, width, gated, special)


def _text_from_config(config: dict[str, Any]) -> Transformer:
    kind = config["model_type"]
    if kind in _T5:
        attention = config["num_heads"] * config["d_kv"]
        gated = config["feed_forward_proj"].startswith("gated")
        return _t5(
            config["d_model"],
            config["num_layers"],
            config["d_ff"],
            attention=attention,
            gated=gated,
        )
    if kind not in _PLAIN | _GATED:
        raise UnknownModel(f"text models of type {kind} are not known")
    sizes = _tower(config, "text_config")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    channels = sizes.get("head_dim") or width // heads
    shared = (sizes.get("num_key_value_heads") or heads) if kind in _GATED else heads
    return Transformer(
        width=width,
        depth=sizes["num_hidden_layers"],
        hidden=sizes["intermediate_size"],
        attention=heads * channels,
        key_value=shared * channels,
        gated=kind in _GATED,
    )


def _autoencoder_from_config(config: dict[str, Any]) -> Autoencoder:
    if config["_class_name"] != "AutoencoderKL":
        raise UnknownModel(f"autoencoders of class {config['_class_name']} are not known")
    if set(config["down_block_types"]) != {"DownEncoderBlock2D"}:
        raise UnknownModel(f"blocks {config['down_block_types']} are not known")
    return Autoencoder(
        widths=tuple(config["block_out_channels"]),
        blocks=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        attention=config.get("mid_block_add_attention", True),
        quantizer=config.get("use_quant_conv", True),
    )
