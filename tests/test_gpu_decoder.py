"""A decoder on a GPU: bf16, both networks, stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_decoder_runs import run_decoder, write_weights
from tiny_runs import checkpoint_tensors

from dsr_scale.telemetry.metrics import read_metrics

pytestmark = pytest.mark.gpu

BF16 = ("training.device=cuda", "training.precision=bf16", "evaluation.every_steps=6")


def test_bf16_goes_on_as_if_never_stopped_and_follows_the_cpu(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights")
    whole = run_decoder(tmp_path / "weights", tmp_path / "whole", *BF16)
    run_decoder(tmp_path / "weights", tmp_path / "halves", *BF16, "training.steps=3")
    halves = run_decoder(tmp_path / "weights", tmp_path / "halves", *BF16)
    ours, expected = checkpoint_tensors(halves, 6), checkpoint_tensors(whole, 6)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-3, rtol=1e-2, msg=name)
    cpu = run_decoder(tmp_path / "weights", tmp_path / "cpu")
    losses = [[r["loss"] for r in read_metrics(run) if "loss" in r] for run in (whole, cpu)]
    # Noise is another one on another kind of device, so only the size of the loss is the same.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert "evaluation/psnr" in read_metrics(whole)[-1]
