"""The model against a plain float64 forward written from the published description alone.

The reference reads the published names from the state dict, cuts the zero padding of the SwiGLU off,
and computes positions and rotations cell by cell.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.model import ClassConditioning, HeadConfig
from dsr_scale.model.build import build_model
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import SwiGLU

CLASSES = 7


def class_shape(
    *,
    head: HeadConfig | None,
    registers: int,
    patch: int = 1,
    qk_norm: bool = False,
    width: int = 48,
) -> ModelShape:
    return ModelShape(
        width=width,
        depth=3,
        heads=4,
        head=head,
        patch=patch,
        channels=5,
        grid=(4, 4),
        registers=registers,
        register_start=1,
        conditioning=ClassConditioning(num_classes=CLASSES),
        text_kind="none",
        text_channels=0,
        text_length=0,
        qk_norm=qk_norm,
        attention="sdpa",
    )


def randomise(model: DiT, seed: int) -> None:
    """No parameter at a special value, padding apart: zero gates would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.6 * noise / math.sqrt(fan_in))
            if "norm" in name:
                parameter.add_(1)
        for module in model.modules():
            if isinstance(module, SwiGLU):
                hidden = int(2 / 3 * 4 * module.w3.out_features)
                padded = module.w3.in_features
                for start in (hidden, padded + hidden):
                    module.w12.weight[start : start + padded - hidden] = 0
                    module.w12.bias[start : start + padded - hidden] = 0
                module.w3.weight[:, hidden:] = 0


class Reference:
    """The published forward, in float64, from a state dict."""

    def __init__(self, shape: ModelShape, state: dict[str, Tensor]) -> None:
        self.shape = shape
        self.p = {name: tensor.double() for name, tensor in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.p[f"{name}.weight"]) + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.p[f"{name}.weight"]

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    @staticmethod
    def sincos(rows: int, columns: int, width: int) -> Tensor:
        table = np.zeros((rows * columns, width))
        quarter = width // 4
        for row in range(rows):
            for column in range(columns):
                for k in range(quarter):
                    omega = 10000.0 ** (-k / quarter)
                    cell = table[row * columns + column]
                    cell[k] = math.sin(column * omega)
                    cell[quarter + k] = math.cos(column * omega)
                    cell[2 * quarter + k] = math.sin(row * omega)
                    cell[3 * quarter + k] = math.cos(row * omega)
        return torch.tensor(table)

    @staticmethod
    def rotate(x: Tensor, grid: tuple[int, int], registers: int) -> Tensor:
        """x [B,h,N,d]."""
        out = x.clone()
        axis = x.shape[-1] // 2
        for row in range(grid[0]):
            for column in range(grid[1]):
                token = registers + row * grid[1] + column
                for half, position in enumerate((row, column)):
                    for i in range(axis // 2):
                        angle = position * 10000.0 ** (-2 * i / axis)
                        first = half * axis + 2 * i
                        a, b = x[:, :, token, first], x[:, :, token, first + 1]
                        out[:, :, token, first] = a * math.cos(angle) - b * math.sin(angle)
                        out[:, :, token, first + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def patches(self, name: str, latents: Tensor) -> Tensor:
        patch = self.shape.patch
        height, width = latents.shape[-2:]
        kernel, bias = self.p[f"{name}.proj.weight"], self.p[f"{name}.proj.bias"]
        tokens = []
        for row in range(height // patch):
            for column in range(width // patch):
                cell = latents[
                    :,
                    :,
                    row * patch : (row + 1) * patch,
                    column * patch : (column + 1) * patch,
                ]
                tokens.append(torch.einsum("bcij,dcij->bd", cell, kernel) + bias)
        return torch.stack(tokens, dim=1)

    def block(
        self, i: int, x: Tensor, c: Tensor, heads: int, grid: tuple[int, int], registers: int
    ) -> Tensor:
        name = f"blocks.{i}"
        width = x.shape[-1]
        modulation = self.linear(f"{name}.adaLN_modulation.1", self.silu(c))
        if modulation.dim() == 2:
            modulation = modulation[:, None]
        parts = [modulation[..., n * width : (n + 1) * width] for n in range(6)]
        y = self.norm(f"{name}.norm1", x) * (1 + parts[1]) + parts[0]
        qkv = self.linear(f"{name}.attn.qkv", y)
        split = [
            qkv[..., n * width : (n + 1) * width]
            .reshape(*x.shape[:2], heads, width // heads)
            .permute(0, 2, 1, 3)
            for n in range(3)
        ]
        q, k, v = split
        if self.shape.qk_norm:
            q, k = self.norm(f"{name}.attn.q_norm", q), self.norm(f"{name}.attn.k_norm", k)
        q, k = self.rotate(q, grid, registers), self.rotate(k, grid, registers)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(width // heads)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        seen = torch.einsum("bhnm,bhmd->bnhd", weights, v).reshape(x.shape)
        x = x + parts[2] * self.linear(f"{name}.attn.proj", seen)
        y = self.norm(f"{name}.norm2", x) * (1 + parts[4]) + parts[3]
        return x + parts[5] * self.swiglu(f"{name}.mlp", y, width)

    def swiglu(self, name: str, y: Tensor, width: int) -> Tensor:
        hidden = int(2 / 3 * 4 * width)
        padded = self.p[f"{name}.w3.weight"].shape[1]
        weight, bias = self.p[f"{name}.w12.weight"], self.p[f"{name}.w12.bias"]
        a = y @ weight[:hidden].T + bias[:hidden]
        b = y @ weight[padded : padded + hidden].T + bias[padded : padded + hidden]
        out = (self.silu(a) * b) @ self.p[f"{name}.w3.weight"][:, :hidden].T
        return out + self.p[f"{name}.w3.bias"]

    def registers(self, name: str, batch: int) -> Tensor:
        tokens = self.p[name]
        side = math.isqrt(tokens.shape[1])
        tokens = tokens + self.sincos(side, side, tokens.shape[2])
        return tokens.expand(batch, -1, -1)

    def __call__(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        shape = self.shape
        latents, t = latents.double(), t.double()
        batch, _, height, width = latents.shape
        grid = (height // shape.patch, width // shape.patch)
        angles = 2 * math.pi * t[:, None] * self.p["t_embedder.W"]
        features = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        t_emb = self.linear(
            "t_embedder.mlp.2", self.silu(self.linear("t_embedder.mlp.0", features))
        )
        c = t_emb + self.p["y_embedder.embedding_table.weight"][labels]
        x_name, register_name = "x_embedder", "register_tokens"
        if shape.head is not None:
            c = self.silu(c)
            x_name, register_name = "s_embedder", "enc_register_tokens"
        x = self.patches(x_name, latents) + self.sincos(*grid, shape.width)
        count = 0
        for i in range(shape.depth):
            if shape.registers and i == shape.register_start:
                x = torch.cat([self.registers(register_name, batch), x], dim=1)
                count = shape.registers
            x = self.block(i, x, c, shape.heads, grid, count)
        if shape.head is not None:
            c = self.silu(t_emb[:, None] + x)
            if shape.head.width != shape.width:
                c = self.linear("s_projector", c)
            x = self.patches("x_embedder", latents)
            if shape.registers:
                x = torch.cat([self.registers("dec_register_tokens", batch), x], dim=1)
            for j in range(shape.head.depth):
                x = self.block(shape.depth + j, x, c, shape.head.heads, grid, count)
            c = c[:, count:]
        else:
            c = c[:, None]
        modulation = self.linear("final_layer.adaLN_modulation.1", self.silu(c))
        half = modulation.shape[-1] // 2
        x = self.norm("final_layer.norm_final", x[:, count:])
        x = self.linear(
            "final_layer.linear", x * (1 + modulation[..., half:]) + modulation[..., :half]
        )
        out = torch.zeros(batch, shape.channels, height, width, dtype=torch.float64)
        for row in range(grid[0]):
            for column in range(grid[1]):
                cell = x[:, row * grid[1] + column].reshape(
                    batch, shape.patch, shape.patch, shape.channels
                )
                for i in range(shape.patch):
                    for j in range(shape.patch):
                        out[:, :, row * shape.patch + i, column * shape.patch + j] = cell[:, i, j]
        return out


HEAD = HeadConfig(width=80, depth=2, heads=5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"head": None},
        {"head": None, "patch": 2, "qk_norm": True},
        {"head": HEAD},
        {"head": HEAD, "patch": 2},
        {"head": HeadConfig(width=48, depth=1, heads=4)},
    ],
    ids=["dit", "dit-patch2-qknorm", "dh", "dh-patch2", "dh-same-width"],
)
@pytest.mark.parametrize("size", [(4, 4), (2, 6)], ids=["square", "wide"])
def test_forward_equals_the_published_description(
    options: dict[str, Any], registers: int, size: tuple[int, int]
) -> None:
    shape = class_shape(registers=registers, **options)
    model = build_model(shape, seed=0)
    randomise(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(3, shape.channels, *size, generator=generator)
    t = torch.tensor([0.05, 0.6, 1.0])
    labels = torch.tensor([2, 5, 0])
    null = torch.tensor([False, True, False])
    rows = torch.where(null, CLASSES, labels)
    with torch.no_grad():
        ours = model(latents, t, Condition(null=null, labels=labels))
    expected = Reference(shape, model.state_dict())(latents, t, rows)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_bf16_weights_keep_the_timestep_table_in_float32() -> None:
    shape = class_shape(head=None, registers=4)
    model = build_model(shape, seed=0)
    randomise(model, seed=1)
    table = model.t_embedder.W.clone()
    condition = Condition(null=torch.tensor([False, False]), labels=torch.tensor([1, 2]))
    latents = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(latents, torch.tensor([0.3, 0.7]), condition)
        for cast in (model.bfloat16, lambda: model.to("cpu", torch.bfloat16), model.half):
            cast()
            assert torch.equal(model.t_embedder.W, table)
            assert model.t_embedder.W.dtype == torch.float32
        model.bfloat16()
        low = model(latents, torch.tensor([0.3, 0.7]), condition)
    assert low.dtype == torch.float32
    assert (low - full).abs().max() < 0.1 * full.abs().max()
