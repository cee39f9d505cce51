"""Training checkpoints made of released training files: weights, averages, AdamW's moments, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import write_list
from published_forward import Published, as_module, random_state
from test_export_published import (
    BODY,
    HEAD,
    RULE,
    assert_computes,
    assert_same_state,
    run_tool,
)
from tiny_runs import checkpoint_tensors, run_training, write_config
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.checkpoint.verification import verify
from dsr_scale.data.pack import pack
from dsr_scale.export.bundle import export_run, read_description, read_model
from dsr_scale.train.state import RunState, check_resumable

NET = Published(BODY, HEAD, registers=4, start=RULE, channels=192, side=4, classes=7)
"""On latents of pixels, 32 × 32 in patches of 8."""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    pack(str(write_list(folder / "source", 20)), folder / "out")
    return folder / "out"


def run_options(labelled: Path, **training: object) -> list[str]:
    """Settings that turn the tiny run into one of `NET` on labelled pictures."""
    model = {
        "width": 56,
        "depth": 5,
        "heads": 2,
        "head": {"width": 80, "depth": 2, "heads": 4},
        "registers": {"count": 4},
        "conditioning": {"kind": "class", "num_classes": 7},
    }
    changed: dict[str, object] = {
        "model": model,
        "data.shards": str(labelled),
        "encoders.text": {"kind": "none"},
        "training.ema_decays": [0.9, 0.99],
        **{f"training.{name}": value for name, value in training.items()},
    }
    return [f"{name}={json.dumps(value)}" for name, value in changed.items()]


def training_file(path: Path) -> tuple[dict[str, Any], Any, Any]:
    """Saves what the released trainer saves after 40 steps; its module and optimizer too."""
    module = as_module(random_state(NET, 0))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(9)
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    for entry in optimizer.state.values():
        entry["step"].fill_(40.0)
    ema = random_state(NET, 1) | {"t_embedder.W": module.get_parameter("t_embedder.W").detach()}
    content = {
        "step": 40,
        "epoch": 2,
        "model": module.state_dict(),
        "ema": ema,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 40, "base_lrs": [2e-4], "lr_lambdas": [None]},
    }
    torch.save(content, path)
    return content, module, optimizer


def cut(value: Tensor, size: torch.Size) -> Tensor:
    """Without padding; asserts that it is zero."""
    if value.shape == size:
        return value
    halves = value.unflatten(0, (2, -1)) if value.shape[0] != size[0] else value
    kept = halves[:, : (size[0] // 2 if halves is not value else size[1])]
    assert halves.count_nonzero() == kept.count_nonzero()
    return kept.reshape(size)


def test_a_run_goes_on_from_a_released_training_file(tmp_path: Path, labelled: Path) -> None:
    content, module, optimizer = training_file(tmp_path / "ep-2.pt")
    # Nothing moves in a step: what comes out of the run is what went in.
    overrides = run_options(labelled, steps=41, optimizer={"learning_rate": 1e-12})
    run = tmp_path / "run"
    said = run_tool("checkpoint", tmp_path / "ep-2.pt", write_config(tmp_path), *overrides)
    assert "AdamW's moments" in said and "'checkpoint.allow_changed=[data.fingerprint]'" in said
    assert verify(directory.step_directory(run, 40)) == []
    held = checkpoint_tensors(run, 40)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        size = parameter.shape
        assert torch.equal(cut(held[f"weights.{name}"], size), parameter)
        for average in ("ema_9", "ema_99"):
            assert torch.equal(cut(held[f"{average}.{name}"], size), content["ema"][name])
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[parameter][kind]
            assert moment.count_nonzero() > 0
            assert torch.equal(cut(held[f"{kind}.{name}"], size), moment)
    assert torch.equal(held["buffers.t_embedder.W"], content["model"]["t_embedder.W"])

    export_run(run, tmp_path / "bundle")
    network = read_model(
        tmp_path / "bundle", read_description(tmp_path / "bundle"), torch.device("cpu")
    )
    assert_computes(network, NET, content["ema"])
    run_tool("export", run, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same_state(back["model"], content["model"])
    assert_same_state(back["ema"], content["ema"])
    with pytest.raises(InputError, match="--average ema_5"):
        run_tool("export", run, tmp_path / "back.pt", "--average", "ema_5")
    with pytest.raises(InputError, match="checkpoints of steps 40"):
        run_tool("checkpoint", tmp_path / "ep-2.pt", write_config(tmp_path), *overrides)

    # The data are not those that it was trained on, and that has to be said.
    saved = RunState.from_json(directory.read_run_state(directory.step_directory(run, 40)))
    with pytest.raises(InputError, match=r"data\.fingerprint was published"):
        check_resumable(saved, replace(saved, data_fingerprint="another"))
    run_training(tmp_path, *overrides, "checkpoint.allow_changed=[data.fingerprint]")
    after = checkpoint_tensors(run, 41)
    for name, before in held.items():
        if name.startswith("weights."):
            torch.testing.assert_close(after[name], before, atol=1e-9, rtol=1e-6)
        if name.startswith("exp_avg_sq."):
            assert bool((after[name] >= 0.95 * 0.9999 * before).all()), name
    state = directory.read_run_state(directory.step_directory(run, 41))
    assert (state["step"], state["samples_seen"], state["skipped_steps"]) == (41, 328, 0)


def test_without_an_optimizer_a_run_starts_with_moments_of_zero(
    tmp_path: Path, labelled: Path
) -> None:
    content, _, _ = training_file(tmp_path / "ep-2.pt")
    torch.save(content["ema"], tmp_path / "bare.pt")
    overrides = run_options(labelled)
    for number, (file, options, step, weights) in enumerate(
        [
            ("bare.pt", [], 0, "ema"),
            ("bare.pt", ["--step", 7], 7, "ema"),
            ("ep-2.pt", ["--fresh-optimizer"], 0, "model"),
        ]
    ):
        folder = tmp_path / str(number)
        config = write_config(folder)
        said = run_tool("checkpoint", tmp_path / file, config, *overrides, *options)
        assert "moments of zero" in said
        held = checkpoint_tensors(folder / "run", step)
        for name, value in held.items():
            kind, _, parameter = name.partition(".")
            if kind.startswith("exp_avg"):
                assert value.count_nonzero() == 0
            else:
                source = weights if kind in ("weights", "buffers") else "ema"
                released = content[source][parameter]
                assert torch.equal(cut(value, released.shape), released), name


def test_checkpoints_of_another_network_or_optimizer_are_refused(
    tmp_path: Path, labelled: Path
) -> None:
    content, _, _ = training_file(tmp_path / "ep-2.pt")
    config = write_config(tmp_path)
    with pytest.raises(InputError, match=r"feat_rope\.freqs_cos is .*not floating"):
        run_tool(
            "checkpoint", tmp_path / "ep-2.pt", config, *run_options(labelled), "model.heads=7"
        )
    content["optimizer"]["state"][3]["exp_avg"] = torch.zeros(2)
    torch.save(content, tmp_path / "wrong.pt")
    with pytest.raises(InputError, match="sizes are not those of"):
        run_tool("checkpoint", tmp_path / "wrong.pt", config, *run_options(labelled))
    assert not (tmp_path / "run").exists()
