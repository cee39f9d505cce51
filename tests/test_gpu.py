"""What must hold on a CUDA device: same network as on the CPU, compiled as eager, training and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import checkpoint_tensors, run_training, write_config

from dsr_scale.config.derive import model_shape
from dsr_scale.config.load import load_run
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT

pytestmark = pytest.mark.gpu

CUDA = "training.device=cuda"


def network_and_inputs(folder: Path) -> tuple[DiT, torch.Tensor, torch.Tensor, Condition]:
    """A network whose every layer matters (nothing left at zero), and one batch."""
    model = build_model(model_shape(load_run(write_config(folder))), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    latents = torch.randn(3, 192, 4, 4, generator=generator)
    tokens = torch.randint(0, 256, (3, 64), generator=generator)
    condition = Condition(null=torch.tensor([False, False, True]), tokens=tokens)
    return model, latents, torch.tensor([0.1, 0.5, 0.9]), condition


def test_cuda_equals_cpu_and_compiled_equals_eager(tmp_path: Path) -> None:
    model, latents, timesteps, condition = network_and_inputs(tmp_path)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        on_cpu = model(latents, timesteps, condition)
        model.cuda()
        inputs = latents.cuda(), timesteps.cuda(), condition.to("cuda")
        on_gpu = model(*inputs)
        for block in model.blocks.values():
            block.compile(fullgraph=True)
        compiled = model(*inputs)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(compiled, on_gpu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_run_goes_on(tmp_path: Path, precision: str) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    settings = (CUDA, f"training.precision={precision}")
    run_training(folders[0], *settings)
    run_training(folders[1], *settings, kill_after=4)
    run_training(folders[1], *settings)
    whole, killed = (checkpoint_tensors(folder / "run", 6) for folder in folders)
    for name, tensor in whole.items():
        # Attention's backward adds in any order on a GPU, so equality is up to rounding.
        torch.testing.assert_close(killed[name], tensor, atol=2e-3, rtol=1e-2, msg=name)
