"""Register files: round trip, the published lists against the published table, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_vision_transformers import vit_config

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import VitImage
from dsr_scale.encoders.register_file import (
    EncoderIdentity,
    RegisterFile,
    checked_neurons,
    encoder_identity,
    load_register_file,
    require_units,
    save_register_file,
)

FILE = RegisterFile("owner/vit", "c0ffee", 16, {2: (7, 3), 0: (5,)}, "a test", {"passes": 2})

PUBLISHED: dict[str, tuple[EncoderIdentity, int, int, dict[int, int]]] = {
    "siglip2_base_patch16_256": (
        EncoderIdentity("google/siglip2-base-patch16-256", None, 256),
        12,
        3072,
        {1: 2, 2: 3, 3: 10, 4: 16, 5: 19},
    ),
    "siglip2_so400m_patch14_224": (
        EncoderIdentity("google/siglip2-so400m-patch14-224", None, 224),
        27,
        4304,
        {
            0: 2,
            2: 3,
            3: 2,
            4: 3,
            5: 3,
            6: 3,
            7: 3,
            8: 4,
            9: 28,
            14: 1,
            17: 2,
            20: 2,
            24: 1,
            25: 1,
            26: 14,
        },
    ),
}
"""Encoder, its layers and MLP units, and how many neurons of each layer the paper's code lists."""


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "registers.json"
    save_register_file(path, FILE)
    assert load_register_file(str(path)) == FILE
    assert list(load_register_file(str(path)).neurons.items()) == [(0, (5,)), (2, (7, 3))]


def test_the_fingerprint_changes_with_the_neurons_only() -> None:
    same = RegisterFile("other", None, 32, {0: [5], 2: [3, 7]}, "elsewhere")
    assert same.fingerprint == FILE.fingerprint
    for neurons in ({2: (7, 3), 0: (6,)}, {2: (7, 3, 4), 0: (5,)}, {2: (7,), 0: (5, 3)}):
        other = RegisterFile("owner/vit", "c0ffee", 16, neurons, "a test")
        assert other.fingerprint != FILE.fingerprint


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_lists_are_the_published_ones(name: str) -> None:
    identity, layers, units, counts = PUBLISHED[name]
    file = load_register_file(f"package:{name}")
    assert {layer: len(neurons) for layer, neurons in file.neurons.items()} == counts
    assert sum(counts.values()) == {12: 50, 27: 72}[layers]
    assert "a-little-hoof/DSR, commit d9ceec1" in file.source
    assert "2605.05206" in file.source
    file.require_encoder(identity)
    assert encoder_identity(VitImage(model=identity.encoder)) == identity
    require_units(file.neurons, [units] * layers)


def test_published_neurons_of_two_layers_are_as_printed() -> None:
    base = load_register_file("package:siglip2_base_patch16_256").neurons
    assert list(base[3]) == [2625, 1756, 181, 3010, 749, 2313, 52, 1126, 2658, 1450]
    so400m = load_register_file("package:siglip2_so400m_patch14_224").neurons
    assert list(so400m[8]) == [3240, 2702, 2980, 1545]


def test_an_encoder_without_a_published_list_is_refused_by_name() -> None:
    with pytest.raises(InputError) as error:
        load_register_file("package:siglip2_so400m_patch16_256")
    assert "package:siglip2_so400m_patch16_256, of which no" in error.value.found
    assert "package:siglip2_so400m_patch14_224" in error.value.required
    assert "dsr-scale registers" in error.value.remedy
    with pytest.raises(InputError, match="of which no"):
        load_register_file("package:../registers/siglip2_base_patch16_256")
    list_of_another = load_register_file("package:siglip2_so400m_patch14_224")
    identity = encoder_identity(VitImage(model="google/siglip2-so400m-patch16-256"))
    with pytest.raises(
        InputError, match=r"so400m-patch16-256 with input size 256\n.*dsr-scale reg"
    ):
        list_of_another.require_encoder(identity)


def test_neurons_of_another_encoder_are_refused(tmp_path: Path) -> None:
    FILE.require_encoder(EncoderIdentity("owner/vit", "c0ffee", 16))
    FILE.require_encoder(EncoderIdentity("owner/vit", None, 16))
    unpinned = RegisterFile("owner/vit", None, 16, {0: [1]}, "a test")
    unpinned.require_encoder(EncoderIdentity("owner/vit", "anything", 16))
    for identity, message in [
        (EncoderIdentity("owner/other", "c0ffee", 16), "required: .* of owner/other"),
        (EncoderIdentity("owner/vit", "decaf0", 16), "required: .* at revision decaf0"),
        (EncoderIdentity("owner/vit", None, 32), "required: .* input size 32"),
    ]:
        with pytest.raises(InputError, match=message):
            FILE.require_encoder(identity)
    copy = vit_config(tmp_path, name="owner/vit", revision="c0ffee")
    assert encoder_identity(copy) == EncoderIdentity("owner/vit", "c0ffee", 16)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({}, "found: no register neurons"),
        ({3: []}, "found: no register neurons"),
        ({0: [1], 3: []}, r"units \[\] of layer 3"),
        ({3: [4, -1]}, r"units \[4, -1\] of layer 3"),
        ({-1: [4]}, "layer -1"),
        ({3: [4, 9, 4]}, "unit 4 of layer 3 twice"),
    ],
)
def test_bad_neurons_are_refused(neurons: dict[int, list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_neurons(neurons)


def test_neurons_outside_the_network_are_refused() -> None:
    require_units({1: (7,)}, [4, 8])
    with pytest.raises(InputError, match="layer 2 in an encoder with 2 layers"):
        require_units({2: (0,)}, [4, 8])
    with pytest.raises(InputError, match="unit 4 of layer 0, whose MLP has 4 units"):
        require_units({0: (3, 4)}, [4, 8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is some other JSON file"),
        ({"version": 2}, "has version 2"),
        ({"neurons": {"0": ["1"]}}, "has other fields or types"),
        ({"neurons": {"first": [1]}}, "has other fields or types"),
        ({"neurons": [[0, 1]]}, "has other fields or types"),
        ({"input_size": "16"}, "has other fields or types"),
        ({"neurons": {"0": [1, 1]}}, r"registers\.json with unit 1 of layer 0 twice"),
        ({"neurons": {}}, r"registers\.json with no register neurons"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "registers.json"
    save_register_file(path, FILE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=message):
        load_register_file(str(path))


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "registers.json"
    with pytest.raises(InputError, match=r"No such file.*\n.*\n.*dsr-scale registers"):
        load_register_file(str(path))
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not JSON"):
            load_register_file(str(path))
    path.write_text("[]")
    with pytest.raises(InputError, match="is some other JSON file"):
        load_register_file(str(path))
