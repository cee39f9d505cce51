"""What tells encoders apart: every value that decides a latent or token, and no path or name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_encoders import tiny_run
from tiny_language_models import WIDTH as TEXT_WIDTH
from tiny_language_models import save_tiny
from tiny_vision_transformers import FAMILIES, RESOLUTION, save_vit, vit_config

from dsr_scale.config.encoders import TextEncoderConfig, TransformersText, VaeImage
from dsr_scale.config.run import RunConfig
from dsr_scale.encode_service.contract import Contract, expected
from dsr_scale.encode_service.local import build_local
from dsr_scale.encoders.identity import tokenizer_digest

CPU = torch.device("cpu")


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    assert all(content.get(name) != value for name, value in changes.items())
    path.write_text(json.dumps(content | changes))


def with_encoders(run: RunConfig, image: Any, text: TextEncoderConfig | None = None) -> RunConfig:
    encoders = run.encoders.model_copy(update={"image": image, "text": text or run.encoders.text})
    data = run.data.model_copy(update={"resolution": RESOLUTION})
    return run.model_copy(update={"encoders": encoders, "data": data})


def language_model(directory: Path) -> TransformersText:
    return TransformersText(model=str(directory), channels=TEXT_WIDTH, max_length=12)


def save_vae(directory: Path) -> VaeImage:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), latent_channels=2, norm_num_groups=4).save_pretrained(
        directory
    )
    return VaeImage(model=str(directory), channels=2, downsample=1)


def changed_keys(run: RunConfig, others: RunConfig) -> set[str]:
    """Names under which the contracts of the loaded encoders differ."""
    before, after = build_local(run, CPU).contract.values, build_local(others, CPU).contract.values
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


VIT_CHANGES: dict[str, Callable[[Path], None]] = {
    "mean": lambda at: change_json(at / "preprocessor_config.json", image_mean=[0.1, 0.4, 0.6]),
    "std": lambda at: change_json(at / "preprocessor_config.json", image_std=[0.3, 0.5, 0.8]),
    "norm": lambda at: change_json(at / "config.json", layer_norm_eps=1e-3),
    "activation": lambda at: change_json(at / "config.json", hidden_act="relu"),
    "heads": lambda at: change_json(at / "config.json", num_attention_heads=1),
}


@pytest.mark.parametrize("change", VIT_CHANGES)
def test_files_beside_a_vit_s_weights_are_part_of_it(tmp_path: Path, change: str) -> None:
    save_vit(tmp_path / "a", "siglip vision")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    VIT_CHANGES[change](tmp_path / "b")
    run = tiny_run(tmp_path)
    one, other = (with_encoders(run, vit_config(tmp_path / name)) for name in "ab")
    assert changed_keys(one, other) == {"image.files"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vit_saved_elsewhere_is_the_same(tmp_path: Path, family: str) -> None:
    save_vit(tmp_path / "a", family)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    change_json(
        tmp_path / "b" / "config.json",
        _name_or_path="elsewhere",
        transformers_version="4.0.0",
        architectures=["Other"],
        dtype="float16",
    )
    one, other = (with_encoders(tiny_run(tmp_path), vit_config(tmp_path / name)) for name in "ab")
    assert not changed_keys(one, other)
    assert "image.files" in build_local(one, CPU).contract.values


def test_a_language_model_s_files_are_part_of_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "a", "llama")
    run = tiny_run(tmp_path)
    images = vit_config(tmp_path / "vit")
    save_vit(tmp_path / "vit", "siglip vision")

    def run_of(name: str) -> RunConfig:
        return with_encoders(run, images, language_model(tmp_path / name))

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert not changed_keys(run_of("a"), run_of("b"))
    change_json(tmp_path / "b" / "config.json", rope_theta=500.0)
    assert changed_keys(run_of("a"), run_of("b")) == {"text.files"}
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    tokenizer = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["cat"] = vocabulary["cat"], vocabulary["red"]
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert changed_keys(run_of("a"), run_of("c")) == {"text.files"}


def test_what_a_tokenizer_was_last_asked_is_no_part_of_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "text", "bert")
    local = build_local(
        with_encoders(
            tiny_run(tmp_path), save_vae(tmp_path / "vae"), language_model(tmp_path / "text")
        ),
        CPU,
    )
    assert local.text is not None
    before = local.text.files_digest
    local.text.encode(["a red cat"])
    assert local.text.files_digest == before


def test_a_tokenizer_in_python_is_told_by_its_files_and_switches(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    (tmp_path / "a.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\ncat\n")
    (tmp_path / "b.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\nred\n")
    digests = [
        tokenizer_digest(BertTokenizer(str(tmp_path / name), do_lower_case=lower))
        for name, lower in [("a.txt", True), ("a.txt", True), ("b.txt", True), ("a.txt", False)]
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_autoencoder_s_scale_is_part_of_it(tmp_path: Path) -> None:
    image = save_vae(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run = tiny_run(tmp_path)
    one = with_encoders(run, image)
    other = with_encoders(run, image.model_copy(update={"model": str(tmp_path / "b")}))
    assert not changed_keys(one, other)
    change_json(tmp_path / "b" / "config.json", scaling_factor=0.5)
    assert changed_keys(one, other) == {"image.files"}


def test_names_count_and_places_do_not(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)

    def contract(image: str, text: str, name: str | None = None) -> Contract:
        vit = vit_config(tmp_path).model_copy(update={"model": image, "name": name})
        words = TransformersText(model=text, channels=8)
        return expected(with_encoders(run, vit, words))

    hub = contract("google/siglip2-base-patch16-256", "google/t5")
    assert hub.values["image.model"] == "google/siglip2-base-patch16-256"
    assert hub.values["text.model"] == "google/t5"
    places = contract("/models/siglip", "package:some/model")
    assert places == contract("~/siglip", str(tmp_path))
    assert not places.values.keys() & {"image.model", "text.model"}
    copy = contract("/models/siglip", "google/t5", "google/siglip2-base-patch16-256")
    assert copy == hub
    assert hub.differences(contract("owner/other", "google/t5").values) == [
        "image.model is google/siglip2-base-patch16-256, wanted owner/other"
    ]
