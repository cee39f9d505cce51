"""Rules about encoders and the way to them: each problem, alone, and that its remedy cures it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsr_scale.base.errors import InputError
from dsr_scale.config.checks import check_run
from dsr_scale.config.encoder_checks import LONGEST_WAIT_S, OTHER_RANKS_WAIT_S
from dsr_scale.config.load import load_run
from dsr_scale.config.problems import ConfigError
from dsr_scale.config.run import RunConfig

BASE = """
name: t
directory: runs/t
data: {shards: shards, resolution: 64}
encoders: {image: {kind: pixels, patch: 8}, text: {kind: bytes}}
model: {width: 64, depth: 4, heads: 4}
training: {global_batch_images: 32, microbatch_images: 4}
"""
CACHE = ["encoder.mode=cache", "encoder.cache=latents"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "found.json").write_text("{}")
    return path


def vit(outliers: str, model: str = "google/siglip2-base-patch16-256") -> list[str]:
    image = f"{{kind: vit, model: {model}, outliers: {outliers}}}"
    return [f"encoders.image={image}", "encoders.decoder.kind=none"]


def problems_of(run: RunConfig) -> list[InputError]:
    try:
        check_run(run)
    except ConfigError as error:
        return list(error.problems)
    except InputError as error:
        return [error]
    return []


CASES: dict[str, tuple[list[str], str, str, list[str]]] = {
    # name: (overrides, in found, in remedy, what the remedy says to do)
    "no cache": (
        ["encoder.mode=cache"],
        "encoder.mode = cache, no encoder.cache",
        "set encoder.cache",
        ["encoder.cache=latents"],
    ),
    "cached random crops": (
        [*CACHE, "data.crop=random"],
        "a latent cache with data.crop = random",
        "data.crop to center",
        ["data.crop=center"],
    ),
    "cached buckets": (
        [*CACHE, "data.buckets=[[64, 64], [128, 32]]"],
        "a latent cache with 2 data.buckets",
        "encoder.mode to inline or service",
        ["encoder.mode=service"],
    ),
    "a wait that other ranks do not outlast": (
        [f"encoder.give_up_after_s={LONGEST_WAIT_S}"],
        "encoder.give_up_after_s = 1500",
        "lower encoder.give_up_after_s",
        ["encoder.give_up_after_s=1499"],
    ),
    "requests that stall for too long": (
        ["encoder.request_timeout_s=600"],
        "request_timeout_s = 600, encoder.give_up_after_s = 600",
        "lower encoder.request_timeout_s",
        ["encoder.request_timeout_s=599"],
    ),
    "a micro-batch over a server's memory": (
        ["encoder.mode=service", "data.buckets=[[128, 128]]", "encoder.server.max_request_mib=1",
         "training.microbatch_images=32"],
        "training.microbatch_images = 32, whose pixels take 2 MiB",
        "raise encoder.server.max_request_mib",
        ["encoder.server.max_request_mib=2"],
    ),
    "listen without a port": (
        ["encoder.server.listen=0.0.0.0"],
        "encoder.server.listen = '0.0.0.0'",
        "like 10.0.0.5:50051",
        ["encoder.server.listen=0.0.0.0:50051"],
    ),
    "listen at no port": (
        ["encoder.server.listen=localhost:65536"],
        "encoder.server.listen = 'localhost:65536'",
        "like 10.0.0.5:50051",
        ["encoder.server.listen=localhost:65535"],
    ),
    "bare IPv6": (
        ["encoder.server.listen='::1:50051'"],
        "encoder.server.listen = '::1:50051'",
        "[fd00::5]:50051",
        ["encoder.server.listen='[::1]:50051'"],
    ),
    "ports run out": (
        ["encoder.server.listen=0.0.0.0:65530", "encoder.server.devices=8"],
        "encoder.server.listen = 0.0.0.0:65530, encoder.server.devices = 8",
        "lower the port",
        ["encoder.server.listen=0.0.0.0:65528"],
    ),
    "a URL for a server": (
        ["encoder.servers=['node1:50051', 'http://node2:50051']"],
        "encoder.servers[1] = 'http://node2:50051'",
        "write encoder.servers[1] like",
        ["encoder.servers=['node1:50051', 'node2:50051']"],
    ),
    "port 0 of a server": (
        ["encoder.servers=['node1:0']"],
        "encoder.servers[0] = 'node1:0'",
        "write encoder.servers[0] like",
        ["encoder.servers=['node1:1']"],
    ),
    "a server twice": (
        ["encoder.servers=['a:1', 'b:1', 'a:1']"],
        "encoder.servers[2] = a:1, which is there before",
        "remove encoder.servers[2]",
        ["encoder.servers=['a:1', 'b:1']"],
    ),
    "an advertised port": (
        ["encoder.server.advertise=node1:50051"],
        "encoder.server.advertise = 'node1:50051'",
        "name under which clients reach",
        ["encoder.server.advertise=node1"],
    ),
    "credentials for nothing": (
        ["encoder.plain=true", "encoder.credentials=keys"],
        "encoder.plain = true, encoder.credentials = keys",
        "remove encoder.plain or encoder.credentials",
        ["encoder.plain=false"],
    ),
    "no register file": (
        vit("{kind: registers, neurons: lost.json}"),
        "encoders.image.outliers.neurons = lost.json, which is no file",
        "run dsr-scale registers",
        vit("{kind: registers, neurons: found.json}"),
    ),
    "no register file to zero": (
        vit("{kind: zeroing, neurons: lost.json}"),
        "encoders.image.outliers.neurons = lost.json",
        "run dsr-scale registers",
        vit("{kind: zeroing, neurons: 'package:siglip2'}"),
    ),
    "no bias file": (
        vit("{kind: attention_bias, neurons: found.json, bias: lost.safetensors}"),
        "encoders.image.outliers.bias = lost.safetensors",
        "correct the path",
        vit("{kind: attention_bias, neurons: found.json, bias: found.json}"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule_reports_its_problem_and_its_remedy_cures_it(base: Path, name: str) -> None:
    overrides, found, remedy, cure = CASES[name]
    (problem,) = problems_of(load_run(base, overrides))
    assert found in problem.found
    assert remedy in problem.remedy
    assert problem.required
    assert problems_of(load_run(base, [*overrides, *cure])) == []


@pytest.mark.parametrize(
    "overrides",
    [
        CACHE,
        [*CACHE, "data.horizontal_flip=0.5"],
        ["encoder.mode=service", "data.workers=0"],
        ["encoder.mode=service", "encoder.give_up_after_s=1"],
        ["encoder.mode=service", "encoder.send=pixels", "data.crop=random"],
        ["data.crop=random", "data.buckets=[[64, 64], [128, 32]]"],
        ["encoder.server.listen=0.0.0.0:0", "encoder.server.devices=8"],
        ["encoder.server.listen='[::]:7070'", "encoder.server.advertise='fd00::5'"],
        ["training.microbatch_images=32", "encoder.server.max_request_mib=1"],
        ["encoders.latent_dtype=bf16"],
        vit("{kind: clamp}"),
        vit("{kind: registers, neurons: found.json}", "facebook/dinov2-with-registers-base"),
        vit("{kind: registers, neurons: found.json}", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    ],
)
def test_what_is_allowed(base: Path, overrides: list[str]) -> None:
    assert problems_of(load_run(base, overrides)) == []


def test_training_gives_up_before_its_other_ranks_do() -> None:
    from dsr_scale.parallel.groups import COLLECTIVE_TIMEOUT_S

    assert LONGEST_WAIT_S < OTHER_RANKS_WAIT_S == COLLECTIVE_TIMEOUT_S


def test_all_problems_of_encoders_are_reported_together(base: Path) -> None:
    overrides = [o for name in ("no cache", "cached random crops", "a URL for a server",
                                "no register file") for o in CASES[name][0]]  # fmt: skip
    kept = [o for o in overrides if o != "encoder.cache=latents"]
    assert len(problems_of(load_run(base, kept))) == 4
