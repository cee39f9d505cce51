"""RAE-DiT and RAE-DiT^DH with diffusion registers (docs/method.md §2).

The forward is a chain of small methods, each of which needs only the modules it names. `span` runs
any stretch of the chain: a pipeline stage is the same network with blocks left out, at whose borders
a `Carried` is handed on, and what blocks share (`Signal`) is computed by each stage for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.model.block import Block
from dsr_scale.model.conditioning import Condition, make_embedder
from dsr_scale.model.layers import FinalLayer, PatchEmbed, TimestepEmbedder
from dsr_scale.model.layout import TokenLayout
from dsr_scale.model.positions import register_grid, rope, sincos_2d

Probe = Callable[[str, Tensor, TokenLayout], None]
"""Called after each block with its name, its output tokens [B,N,D] and the layout."""


@dataclass(frozen=True)
class Signal:
    """What all blocks of one forward share."""

    t_emb: Tensor
    """Timestep embedding [B,1,D]."""
    c: Tensor
    """Condition of the body: [B,1,D], or per row with registers first [B,K+T,D]."""
    text: Tensor | None
    """[B,L,D] with cross-attention or text in context."""
    mask: Tensor | None
    """Keys, True = seen: text [B,1,1,L] with cross-attention, all rows [B,1,1,K+L+T] in context."""


class Carried(NamedTuple):
    """What leaves one stretch of blocks and enters the next."""

    tokens: Tensor
    """[B,N,D] in the body, [B,K+T,E] in the head."""
    modulation: Tensor | None
    """Inside the head: what modulates it, [B,K+T,E]."""


class DiT(nn.Module):
    """The diffusion transformer; with `shape.head` the DDT-head variant RAE-DiT^DH."""

    register_tokens: nn.Parameter
    enc_register_tokens: nn.Parameter
    dec_register_tokens: nn.Parameter

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        width, head = shape.width, shape.head
        self.kind = shape.conditioning.kind
        self.depth = shape.depth
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = make_embedder(shape)
        body = [
            Block(
                width,
                shape.heads,
                cross=self.kind == "cross_attention",
                qk_norm=shape.qk_norm,
                attention=shape.attention,
                variant=shape.attention_variant,
                hidden=shape.registers_in(index) if shape.registers_masked else 0,
            )
            for index in range(shape.depth)
        ]
        wide = []
        if head is None:
            self.x_embedder = PatchEmbed(shape.channels, width, shape.patch)
            if shape.registers:
                self.register_tokens = nn.Parameter(torch.empty(1, shape.registers, width))
        else:
            self.s_embedder = PatchEmbed(shape.channels, width, shape.patch)
            self.x_embedder = PatchEmbed(shape.channels, head.width, shape.patch)
            same = width == head.width
            self.s_projector = nn.Identity() if same else nn.Linear(width, head.width)
            if shape.registers:
                self.enc_register_tokens = nn.Parameter(torch.empty(1, shape.registers, width))
                self.dec_register_tokens = nn.Parameter(torch.empty(1, shape.registers, head.width))
            wide = [
                Block(
                    head.width,
                    head.heads,
                    qk_norm=shape.qk_norm,
                    attention=shape.attention,
                    variant=shape.attention_variant,
                    hidden=shape.registers if shape.registers_masked else 0,
                )
                for _ in range(head.depth)
            ]
        # Keys and not places: a stage that holds blocks 7 and 8 only still calls them so.
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(body + wide)})
        self.final_layer = FinalLayer(head.width if head else width, shape.patch, shape.channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        *,
        probe: Probe | None = None,
    ) -> Tensor:
        """Noised latents [B,C,H,W] and timesteps [B] in [0,1] (1 is noise) → output [B,C,H,W] fp32.

        H and W may be any multiple of the patch. Raises InputError when they are not.
        """
        layout = self.layout(latents.shape[-2], latents.shape[-1], condition)
        signal = self.signal(timesteps, condition, layout)
        carried = self.span(range(self.total_blocks), None, latents, signal, layout, probe=probe)
        return self.leave(carried, signal, layout)

    @property
    def total_blocks(self) -> int:
        """Blocks of body and head; their numbers run through both."""
        return self.depth + (self.shape.head.depth if self.shape.head else 0)

    def block_name(self, index: int) -> str:
        """What a probe is told of block `index`: `blocks.3`, or `head.0` for the head's first."""
        return f"blocks.{index}" if index < self.depth else f"head.{index - self.depth}"

    def span(
        self,
        blocks: range,
        carried: Carried | None,
        latents: Tensor,
        signal: Signal,
        layout: TokenLayout,
        *,
        probe: Probe | None = None,
    ) -> Carried:
        """Runs a stretch of blocks; `carried` is what the stretch before put out, None at block 0."""
        tokens, modulation = carried or (self.enter_body(latents, signal, layout), None)
        for index in blocks:
            if index == self.depth:
                modulation = self.head_modulation(tokens, signal)
                tokens = self.enter_head(latents, layout)
            if index < self.depth:
                tokens = self.body_block(index, tokens, signal, layout)
            else:
                assert modulation is not None
                tokens = self.head_block(index, tokens, modulation, layout)
            if probe is not None:
                probe(self.block_name(index), tokens, layout)
            if index == self.depth - 1:
                tokens = self.leave_body(tokens, layout)
        return Carried(tokens, modulation)

    # The parts of the forward, in order.

    def layout(self, height: int, width: int, condition: Condition) -> TokenLayout:
        """The token layout of latents of this height and width and of this condition's text."""
        patch = self.shape.patch
        if height % patch or width % patch:
            raise InputError(
                found=f"latents of {height}×{width} cells",
                required=f"sides divisible by model.patch = {patch}",
                remedy="change data.buckets, data.resolution or model.patch",
            )
        return TokenLayout(
            registers=self.shape.registers,
            text=condition.text_length if self.kind == "in_context" else 0,
            grid=(height // patch, width // patch),
            start=self.shape.register_start,
            depth=self.depth,
        )

    def signal(self, timesteps: Tensor, condition: Condition, layout: TokenLayout) -> Signal:
        """Embeds timestep and condition; needs `t_embedder` and `y_embedder`."""
        t_emb = self.t_embedder(timesteps)[:, None]
        vector, text, text_mask = self.y_embedder(condition, layout.grid)
        if vector.shape[1] > 1 and layout.registers:
            # Per-token conditions have no row for a register: it sees the mean (docs/method.md §6).
            mean = vector.mean(dim=1, keepdim=True).expand(-1, layout.registers, -1)
            vector = torch.cat([mean, vector], dim=1)
        c = t_emb + vector
        if self.shape.head is not None:
            c = functional.silu(c)
        mask = None
        if self.kind == "cross_attention":
            mask = text_mask[:, None, None]
        elif self.kind == "in_context":
            mask = functional.pad(text_mask, (layout.registers, layout.image), value=True)
            mask = mask[:, None, None]
        return Signal(t_emb, c, text, mask)

    def head_signal(self, timesteps: Tensor) -> Signal:
        """What blocks of the head share: the timestep; their condition comes out of the body."""
        t_emb = self.t_embedder(timesteps)[:, None]
        return Signal(t_emb, t_emb, None, None)

    def enter_body(self, latents: Tensor, signal: Signal, layout: TokenLayout) -> Tensor:
        """Image tokens with fixed positions, after the text if that is in context: [B,L+T,D]."""
        embedder = self.x_embedder if self.shape.head is None else self.s_embedder
        tokens = embedder(latents.to(embedder.proj.weight.dtype))
        tokens = tokens + sincos_2d(layout.grid, self.shape.width, tokens.device).to(tokens.dtype)
        if layout.text:
            assert signal.text is not None
            tokens = torch.cat([signal.text, tokens], dim=1)
        return tokens

    def body_block(self, index: int, tokens: Tensor, signal: Signal, layout: TokenLayout) -> Tensor:
        """Body block `index`; the registers enter at its entrance when it is their start."""
        if layout.registers_enter(index):
            tokens = self.enter_registers(tokens)
        rows = layout.inside(index)
        absent = layout.registers - rows.registers
        c = self.block_condition(index, signal, layout)
        head_dim = self.shape.width // self.shape.heads
        cos, sin = rope(rows, layout.grid, head_dim, tokens.device)
        block = self.blocks[str(index)]
        if self.kind == "cross_attention":
            return block(tokens, c, cos, sin, None, signal.text, signal.mask)
        mask = None if signal.mask is None else signal.mask[..., absent:]
        return block(tokens, c, cos, sin, mask)

    def block_condition(self, index: int, signal: Signal, layout: TokenLayout) -> Tensor:
        """What modulates body block `index`: one row for all tokens, or one for each that it has."""
        if signal.c.shape[1] == 1:
            return signal.c
        return signal.c[:, layout.registers - layout.inside(index).registers :]

    def enter_registers(self, tokens: Tensor) -> Tensor:
        """Prepends the body's registers: [B,N,D] → [B,K+N,D]."""
        learned = self.register_tokens if self.shape.head is None else self.enc_register_tokens
        return _prepend_registers(learned, tokens)

    def leave_body(self, tokens: Tensor, layout: TokenLayout) -> Tensor:
        """Drops the text; registers stay: [B,K+L+T,D] → [B,K+T,D]."""
        if not layout.text:
            return tokens
        rows = layout.full
        return torch.cat([tokens[:, rows.register_slice], tokens[:, rows.image_slice]], dim=1)

    def head_modulation(self, tokens: Tensor, signal: Signal) -> Tensor:
        """What modulates the head, row by row: [B,K+T,D] → [B,K+T,E]; needs `s_projector`."""
        return self.s_projector(functional.silu(signal.t_emb + tokens))

    def enter_head(self, latents: Tensor, layout: TokenLayout) -> Tensor:
        """Tokens of the head, its own registers first: [B,C,H,W] → [B,K+T,E]."""
        tokens = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        if layout.registers:
            tokens = _prepend_registers(self.dec_register_tokens, tokens)
        return tokens

    def head_block(
        self, index: int, tokens: Tensor, modulation: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Block `index`, one of the head; every row has its own row of the body's output."""
        head = self.shape.head
        assert head is not None
        cos, sin = rope(layout.head, layout.grid, head.width // head.heads, tokens.device)
        return self.blocks[str(index)](tokens, modulation, cos, sin)

    def leave(self, carried: Carried, signal: Signal, layout: TokenLayout) -> Tensor:
        """Drops the registers, applies the final layer, unpatchifies: [B,K+T,·] → [B,C,H,W] fp32."""
        tokens, modulation = carried
        c = signal.c if modulation is None else modulation
        image = layout.head.image_slice
        if c.shape[1] > 1:
            c = c[:, image]
        out = self.final_layer(tokens[:, image], c).float()
        rows, columns = layout.grid
        patch = self.shape.patch
        out = out.reshape(len(out), rows, columns, patch, patch, self.shape.channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(
            len(out), self.shape.channels, rows * patch, columns * patch
        )


def _prepend_registers(learned: Tensor, tokens: Tensor) -> Tensor:
    """`[learned + fixed positions | tokens]`: [1,K,D] and [B,N,D] → [B,K+N,D]."""
    positions = sincos_2d(register_grid(learned.shape[1]), learned.shape[2], learned.device)
    registers = learned + positions.to(learned.dtype)
    return torch.cat([registers.expand(len(tokens), -1, -1), tokens], dim=1)
