"""Sample sets: which prompts, and the same images whatever the batch and the division among ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_fixtures import write_list
from tiny_bundles import CLASSES, SIDE, write_tiny_bundle

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.data.pack import pack
from dsr_scale.data.shares import Share
from dsr_scale.evaluate import sample_sets
from dsr_scale.export.pipeline import Pipeline, load


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(write_tiny_bundle(tmp_path_factory.mktemp("captions")), device="cpu")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(write_tiny_bundle(tmp_path_factory.mktemp("classes"), classes=True), device="cpu")


def test_images_depend_on_their_prompt_and_place_alone(captions: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \nein Bär\n", encoding="utf-8")
    samples = sample_sets.prompts_in_turn(file, 7)
    digest = hashlib.sha256("a cat\na dog\nein Bär".encode()).hexdigest()
    assert samples.source == f"{file} ({digest})"
    assert samples.prompts == (*("a cat", "a dog", "ein Bär") * 2, "a cat")
    sampling = SamplingConfig(steps=3, guidance=2.0)
    alone = torch.cat(
        [
            captions.decoder.decode(
                captions.latents([prompt], seed=5, sampling=sampling, first_index=index)
            )
            for index, prompt in enumerate(samples.prompts)
        ]
    ).int()
    assert (alone[0] - alone[6]).abs().max() > 10  # one prompt, two noises
    for of in (1, 3, 9):
        parts = [
            part
            for index in range(of)
            for part in sample_sets.draw(
                captions, samples, seed=5, sampling=sampling, batch=2, share=Share(index, of)
            )
        ]
        images = torch.cat([part.images for part in parts]).int()
        # Matrices of another size may round one pixel differently.
        assert (images - alone).abs().max() <= 1
        for part in parts:
            stop = part.first_index + len(part.images)
            assert part.prompts == samples.prompts[part.first_index : stop]


def test_classes_are_balanced(classes: Pipeline, captions: Pipeline) -> None:
    samples = sample_sets.class_balanced(classes.shape, 3 * CLASSES + 2)
    counts = Counter(samples.prompts)
    assert set(counts) == {str(label) for label in range(CLASSES)}
    assert max(counts.values()) - min(counts.values()) == 1
    drawn = sample_sets.draw(classes, samples, seed=0, sampling=SamplingConfig(steps=2), batch=16)
    assert sum(len(part.images) for part in drawn) == len(samples)
    with pytest.raises(InputError, match="conditioned by cross_attention"):
        sample_sets.class_balanced(captions.shape, 7)


def test_conditions_of_a_data_set(captions: Pipeline, classes: Pipeline, tmp_path: Path) -> None:
    pack(str(write_list(tmp_path / "list", 8, height=SIDE, width=SIDE)), tmp_path / "shards")
    data = DataConfig(shards=str(tmp_path / "shards"), resolution=SIDE)
    spread = sample_sets.captions_of(data, captions.shape, 4)
    assert spread.prompts == ("picture 0", "picture 2", "picture 4", "picture 6")
    every = sample_sets.captions_of(data, classes.shape, None)
    assert every.prompts == ("0", "1", "2", "3", "4", "5", "6", "0")
    with pytest.raises(InputError, match="required: 9 samples"):
        sample_sets.captions_of(data, captions.shape, 9)


def test_prompt_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match="cannot be read"):
        sample_sets.read_prompts(file)
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="cannot be read"):
        sample_sets.read_prompts(file)
    file.write_text(" \n\n")
    with pytest.raises(InputError, match="no prompt in"):
        sample_sets.read_prompts(file)
    # What editors put before the text is none of it, and a separator inside a line does not end it.
    file.write_bytes("\ufeffa\r\nb\u2028c\x0bd\n".encode())
    assert sample_sets.read_prompts(file) == ("a", "b\u2028c\x0bd")
    file.write_text("a\nb\n")
    assert sample_sets.prompts_of_images(file, 2).prompts == ("a", "b")
    with pytest.raises(InputError, match=r"2 prompts in .*, 3 images"):
        sample_sets.prompts_of_images(file, 3)
