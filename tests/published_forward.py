"""RAE-DiT and RAE-DiT^DH in float64, written from their description on the released names alone.

`random_state` makes weights in the released layout, in the order in which the released model registers
them; `forward` is what the released network computes with them. Neither knows this package's network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stack:
    """Equal blocks."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class Published:
    """Sizes of a released network."""

    body: Stack
    head: Stack | None = None
    """Of RAE-DiT^DH."""
    registers: int = 0
    start: int = 0
    patch: int = 1
    channels: int = 5
    side: int = 4
    """Of the latent grid."""
    classes: int = 7
    qk_norm: bool = False

    @property
    def tokens_a_side(self) -> int:
        """Of the image, along one axis."""
        return self.side // self.patch


def random_state(net: Published, seed: int) -> State:
    """A state dict without special values: gates of zero would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> State:
        weight, bias = normal(outputs, inputs) * 0.6 / math.sqrt(inputs), 0.3 * normal(outputs)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": 1 + 0.3 * normal(width)}

    def patch_embedding(name: str, width: int) -> State:
        fan_in = net.channels * net.patch**2
        weight = normal(width, net.channels, net.patch, net.patch) / math.sqrt(fan_in)
        return {f"{name}.proj.weight": weight, f"{name}.proj.bias": 0.3 * normal(width)}

    def block(name: str, width: int, heads: int) -> State:
        hidden = int(2 / 3 * 4 * width)
        state = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
        state |= linear(f"{name}.attn.qkv", width, 3 * width)
        if net.qk_norm:
            state |= norm(f"{name}.attn.q_norm", width // heads)
            state |= norm(f"{name}.attn.k_norm", width // heads)
        state |= linear(f"{name}.attn.proj", width, width)
        state |= linear(f"{name}.mlp.w12", width, 2 * hidden)
        state |= linear(f"{name}.mlp.w3", hidden, width)
        return state | linear(f"{name}.adaLN_modulation.1", width, 6 * width)

    body, head = net.body, net.head
    last = head or body
    stacks = [("", body)] if head is None else [("enc_", body), ("dec_", head)]
    state: State = {"pos_embed": sincos(net.tokens_a_side, body.width)[None]}
    if net.registers:
        side = math.isqrt(net.registers)
        for prefix, stack in stacks:
            state[f"{prefix}register_pos_embed"] = sincos(side, stack.width)[None]
        for prefix, stack in stacks:
            state[f"{prefix}register_tokens"] = normal(1, net.registers, stack.width)
    state |= patch_embedding("x_embedder", last.width)
    if head is not None:
        state |= patch_embedding("s_embedder", body.width)
        if head.width != body.width:
            state |= linear("s_projector", body.width, head.width)
    state["t_embedder.W"] = normal(256)
    state |= linear("t_embedder.mlp.0", 512, body.width)
    state |= linear("t_embedder.mlp.2", body.width, body.width)
    state["y_embedder.embedding_table.weight"] = 0.5 * normal(net.classes + 1, body.width)
    for prefix, stack in stacks:
        for suffix, still in (("", 0), ("_incontext", net.registers))[: 2 if net.registers else 1]:
            cos, sin = rotary(net.tokens_a_side, stack.width // stack.heads, still)
            state[f"{prefix}feat_rope{suffix}.freqs_cos"] = cos
            state[f"{prefix}feat_rope{suffix}.freqs_sin"] = sin
    number = 0
    for _, stack in stacks:
        for _ in range(stack.depth):
            state |= block(f"blocks.{number}", stack.width, stack.heads)
            number += 1
    state |= norm("final_layer.norm_final", last.width)
    state |= linear("final_layer.linear", last.width, net.patch**2 * net.channels)
    return state | linear("final_layer.adaLN_modulation.1", last.width, 2 * last.width)


def sincos(side: int, width: int) -> Tensor:
    """float32 [side², width]: the column's sines and cosines, then the row's."""
    table = []
    for row in range(side):
        for column in range(side):
            values: list[float] = []
            for index in (column, row):
                angles = [index * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
                values += [math.sin(angle) for angle in angles]
                values += [math.cos(angle) for angle in angles]
            table.append(values)
    return torch.tensor(table, dtype=torch.float64).float()


def rotary(side: int, head_dim: int, still: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [still + side², head_dim]; the first rows do not turn."""
    axis = head_dim // 2
    angles = [[0.0] * head_dim] * still
    for row in range(side):
        for column in range(side):
            of_token: list[float] = []
            for index in (row, column):
                for i in range(axis // 2):
                    of_token += [index * 10000 ** (-2 * i / axis)] * 2
            angles.append(of_token)
    table = torch.tensor(angles, dtype=torch.float64)
    return table.cos().float(), table.sin().float()


def as_module(state: State) -> nn.Module:
    """A module that registers these tensors as the released one does: parameters, frozen or not, and
    rotary tables as buffers."""
    root = nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if leaf.startswith("freqs_"):
            module.register_buffer(leaf, value.clone())
        else:
            trains = leaf != "W" and not leaf.endswith("pos_embed")
            module.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=trains))
    return root


def forward(state: State, net: Published, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Latents [B,C,H,W], t and labels [B] (the last row of the table is the null class) → [B,C,H,W]."""
    p = {name: value.double() for name, value in state.items()}
    latents = latents.double()
    angles = 2 * math.pi * t.double()[:, None] * p["t_embedder.W"]
    features = torch.cat([angles.sin(), angles.cos()], dim=1)
    t_emb = _linear(p, "t_embedder.mlp.2", _silu(_linear(p, "t_embedder.mlp.0", features)))
    c = (t_emb + p["y_embedder.embedding_table.weight"][labels])[:, None]
    t_emb = t_emb[:, None]
    ddt = net.head is not None
    if ddt:
        c = _silu(c)
    prefix = "enc_" if ddt else ""
    x = _patches(p, "s_embedder" if ddt else "x_embedder", latents, net.patch) + p["pos_embed"]
    for i in range(net.body.depth):
        if net.registers and i == net.start:
            x = _with_registers(p, prefix, x)
        inside = net.registers and i >= net.start
        x = _block(p, i, x, c, net.body.heads, f"{prefix}feat_rope{'_incontext' if inside else ''}")
    if net.head is not None:
        c = _silu(t_emb + x)
        if "s_projector.weight" in p:
            c = _linear(p, "s_projector", c)
        x = _patches(p, "x_embedder", latents, net.patch)
        if net.registers:
            x = _with_registers(p, "dec_", x)
        rope = "dec_feat_rope" + ("_incontext" if net.registers else "")
        for i in range(net.body.depth, net.body.depth + net.head.depth):
            x = _block(p, i, x, c, net.head.heads, rope)
        c = c[:, net.registers :]
    x = x[:, net.registers :]
    shift, scale = _linear(p, "final_layer.adaLN_modulation.1", _silu(c)).chunk(2, dim=-1)
    out = _linear(
        p, "final_layer.linear", _norm(p, "final_layer.norm_final", x) * (1 + scale) + shift
    )
    image = torch.empty_like(latents)
    for token in range(out.shape[1]):
        row, column = divmod(token, net.tokens_a_side)
        cell = out[:, token].reshape(-1, net.patch, net.patch, net.channels)
        rows = slice(row * net.patch, (row + 1) * net.patch)
        columns = slice(column * net.patch, (column + 1) * net.patch)
        image[:, :, rows, columns] = cell.permute(0, 3, 1, 2)
    return image


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _linear(p: State, name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _norm(p: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]


def _patches(p: State, name: str, latents: Tensor, patch: int) -> Tensor:
    kernel = p[f"{name}.proj.weight"].flatten(1)
    tokens = [
        latents[:, :, row : row + patch, column : column + patch].flatten(1) @ kernel.T
        for row in range(0, latents.shape[2], patch)
        for column in range(0, latents.shape[3], patch)
    ]
    return torch.stack(tokens, dim=1) + p[f"{name}.proj.bias"]


def _with_registers(p: State, prefix: str, x: Tensor) -> Tensor:
    registers = p[f"{prefix}register_tokens"] + p[f"{prefix}register_pos_embed"]
    return torch.cat([registers.repeat(len(x), 1, 1), x], dim=1)


def _block(p: State, i: int, x: Tensor, c: Tensor, heads: int, rope: str) -> Tensor:
    name = f"blocks.{i}"
    parts = _linear(p, f"{name}.adaLN_modulation.1", _silu(c)).chunk(6, dim=-1)
    y = _norm(p, f"{name}.norm1", x) * (1 + parts[1]) + parts[0]
    x = x + parts[2] * _attention(p, f"{name}.attn", y, heads, rope)
    y = _norm(p, f"{name}.norm2", x) * (1 + parts[4]) + parts[3]
    a, b = _linear(p, f"{name}.mlp.w12", y).chunk(2, dim=-1)
    return x + parts[5] * _linear(p, f"{name}.mlp.w3", _silu(a) * b)


def _attention(p: State, name: str, x: Tensor, heads: int, rope: str) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in _linear(p, f"{name}.qkv", x).chunk(3, dim=-1)
    )
    if f"{name}.q_norm.weight" in p:
        q, k = _norm(p, f"{name}.q_norm", q), _norm(p, f"{name}.k_norm", k)
    q, k = _turned(p, rope, q), _turned(p, rope, k)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return _linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def _turned(p: State, rope: str, x: Tensor) -> Tensor:
    """Adjacent channels as complex numbers, times what the tables say."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(p[f"{rope}.freqs_cos"][:, ::2], p[f"{rope}.freqs_sin"][:, ::2])
    return torch.view_as_real(pairs * turn).flatten(-2)
