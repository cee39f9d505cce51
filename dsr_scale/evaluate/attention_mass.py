"""Where attention goes: to registers, to tokens of large norm, to text, to the rest.

The networks use fused attention, which keeps no probabilities. Hooks take the queries and keys
that a block is about to use, with its own rotation and mask, and the probabilities are computed again
in float32, a few images at a time: no code of a model changes, and memory is bounded by
`_PROBABILITIES_AT_ONCE`, not by the batch.

Counted is the attention *of image tokens*, averaged over heads; which tokens have a large norm is
decided on what enters the block, since that is what the attention reads. The extra key of an attention
bias, or of softmax-off-by-one, is a key like others: what goes there went to no token. A gate on the
heads' outputs is not counted, as it does not change where attention goes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from dsr_scale.encoders.patch_norms import removed
from dsr_scale.encoders.vit import VitEncoder
from dsr_scale.evaluate.outlier_statistics import TokenRows
from dsr_scale.model.block import Block
from dsr_scale.model.dit import DiT
from dsr_scale.model.layers import Attention, CrossAttention, rotate

TOP_NORM_SHARE = 0.01
"""Of image tokens, at least one, are called top-norm."""
QUERIES = ("q_proj", "query")
"""Last words of a vision transformer's projection to queries."""
_PROBABILITIES_AT_ONCE = 1 << 26


class AttentionReading(NamedTuple):
    """What one attention is about to compute."""

    block: str
    entering: Tensor
    """Norms of the tokens that enter the block, float32 [B,N]."""
    q: Tensor
    """[B,heads,N,d], rotated."""
    k: Tensor
    """[B,heads,M,d], rotated; M = N, N+1 with an extra key (the last), or text tokens."""
    mask: Tensor | None
    """Keys [B,1,1,M], True = seen."""
    hidden: int = 0
    """So many first rows are seen by each other only: registers that are masked from patches."""

    @property
    def visible(self) -> Tensor:
        """Which keys a row after the hidden ones sees: bool [B,M]."""
        return self.visible_to(self.q.shape[2])

    def visible_to(self, row: int) -> Tensor:
        """Which keys query `row` sees: bool [B,M]."""
        shape = (len(self.k), self.k.shape[2])
        if self.mask is None:
            seen = torch.ones(shape, dtype=torch.bool, device=self.k.device)
        else:
            seen = self.mask[:, 0, 0].expand(shape)
        if row < self.hidden:
            return seen
        return seen & (torch.arange(shape[1], device=seen.device) >= self.hidden)

    def of_first(self, images: int) -> AttentionReading:
        """The same of the first images alone."""
        mask = None if self.mask is None else self.mask[:images]
        return self._replace(
            entering=self.entering[:images], q=self.q[:images], k=self.k[:images], mask=mask
        )


OnAttention = Callable[[AttentionReading], None]


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of q·k/√d over seen keys, in float32: [B,heads,Q,M]."""
    logits = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1)


def received(reading: AttentionReading, queries: slice) -> tuple[Tensor, Tensor]:
    """Mass [B,M] that each key receives from a row of `queries`, averaged over heads and rows.

    None of these rows is a hidden one. Beside it the entropy of such a row [B], over that of uniform
    attention to the seen keys.
    """
    q, k, seen = reading.q[:, :, queries], reading.k, reading.visible
    images = max(1, _PROBABILITIES_AT_ONCE // (q[0, ..., 0].numel() * k.shape[-2]))
    masses, entropies = [], []
    for first in range(0, len(q), images):
        part = slice(first, first + images)
        p = probabilities(q[part], k[part], seen[part, None, None])
        masses.append(p.mean((1, 2)))
        entropies.append(torch.special.entr(p).sum(-1).mean((1, 2)))
    uniform = seen.sum(1).float().log()
    return torch.cat(masses), torch.cat(entropies) / uniform


def attention_of(reading: AttentionReading, rows: Tensor) -> Tensor:
    """Attention of each image's query `rows` [B,R] int64 to every key, mean over heads: [B,R,M].

    Either all or none of the rows are hidden ones.
    """
    seen = reading.visible_to(int(rows.min()))
    q = reading.q.gather(
        2, rows[:, None, :, None].expand(-1, reading.q.shape[1], -1, reading.q.shape[3])
    )
    return probabilities(q, reading.k, seen[:, None, None]).mean(1)


def top_norm_tokens(norms: Tensor) -> Tensor:
    """The `TOP_NORM_SHARE` of norms [B,T] that are largest: bool [B,T]."""
    largest = norms.topk(math.ceil(TOP_NORM_SHARE * norms.shape[1]), dim=1).indices
    return torch.zeros_like(norms, dtype=torch.bool).scatter(1, largest, value=True)


def self_attention_measures(
    reading: AttentionReading, mass: Tensor, entropy: Tensor, rows: TokenRows
) -> dict[str, Tensor]:
    """Measures [B] of `received` by the image's queries; NaN for sorts of tokens that are absent."""
    visible = reading.visible
    tokens = reading.entering.shape[1]
    top = top_norm_tokens(reading.entering[:, rows.image])
    groups = {
        "registers": (rows.registers, None),
        "top_norm": (rows.image, top),
        "text": (rows.text, None),
        "special": (rows.special, None),
        "extra_key": (slice(tokens, None), None),
        "rest": (rows.image, ~top),
    }
    values = {"attention_entropy": entropy}
    for group, (where, chosen) in groups.items():
        counted = visible[:, where] if chosen is None else visible[:, where] & chosen
        count = counted.sum(1)
        total = (mass[:, where] * counted).sum(1)
        total = torch.where(count > 0, total, math.nan)
        values[f"attention_{group}"] = total
        values[f"attention_{group}_per_token"] = total / count * visible.sum(1)
    return values


def cross_attention_measures(reading: AttentionReading, queries: slice) -> dict[str, Tensor]:
    """Measures [B] of the attention of rows `queries` to text; its whole mass is on text."""
    mass, entropy = received(reading, queries)
    return {
        "cross_text_per_token": mass.sum(1) / reading.visible.sum(1),
        "cross_text_top": mass.amax(1),
        "cross_entropy": entropy,
    }


@contextlib.contextmanager
def observed_dit(model: DiT, on_self: OnAttention, on_cross: OnAttention) -> Iterator[None]:
    """Inside, forwards of `model` hand out what every attention of its blocks is about to compute."""
    hooks: list[RemovableHandle] = []
    for index in range(model.total_blocks):
        block = model.blocks[str(index)]
        assert isinstance(block, Block)
        name = model.block_name(index)
        entering: dict[str, Tensor] = {}
        hooks += [
            block.register_forward_pre_hook(_keep_norms(entering), with_kwargs=True),
            block.attn.register_forward_pre_hook(_read_self(name, entering, on_self)),
        ]
        if block.has_cross:
            hooks.append(
                block.cross.register_forward_pre_hook(_read_cross(name, entering, on_cross))
            )
    with removed(hooks):
        yield


@contextlib.contextmanager
def observed_vit(encoder: VitEncoder, on_self: OnAttention) -> Iterator[None]:
    """Inside, forwards of the encoder hand out what every attention has just computed."""
    heads = encoder.model.config.num_attention_heads
    hooks: list[RemovableHandle] = []
    structure = encoder.structure
    for index, (block, key) in enumerate(zip(structure.blocks, structure.keys, strict=True)):
        attention = next(part for part in block.modules() if key in part.children())
        query = next(part for name, part in attention.named_children() if name in QUERIES)
        kept: dict[str, Tensor] = {}
        hooks += [
            block.register_forward_pre_hook(_keep_norms(kept), with_kwargs=True),
            query.register_forward_hook(_keep_heads(kept, "q", heads)),
            key.register_forward_hook(_keep_heads(kept, "k", heads)),
            attention.register_forward_hook(
                _read_vit(f"blocks.{index}", kept, on_self), with_kwargs=True
            ),
        ]
    with removed(hooks):
        yield


def queries_and_keys(
    attention: Attention, x: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `attention` compares for x [B,N,D], normed and rotated: queries and keys [B,heads,N,d].

    An attention bias and softmax-off-by-one add their key as the last one.
    """
    qkv = attention.qkv(x).unflatten(-1, (3, -1, attention.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if attention.variant == "bias":
        k = torch.cat([k, attention.sink.key[None, :, None].expand(len(k), -1, -1, -1)], dim=2)
    elif attention.variant == "off_by_one":
        k = functional.pad(k, (0, 0, 0, 1))
    return q, k


def _keep_norms(kept: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = inputs[0] if inputs else named["hidden_states"]
        kept["entering"] = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32)

    return hook


def _read_self(name: str, kept: dict[str, Tensor], tell: OnAttention) -> Callable[..., None]:
    def hook(attention: Attention, inputs: tuple[Any, ...]) -> None:
        x, cos, sin, mask = inputs
        q, k = queries_and_keys(attention, x, cos, sin)
        if mask is not None and k.shape[2] > x.shape[1]:
            mask = functional.pad(mask, (0, 1), value=True)
        tell(AttentionReading(name, kept["entering"], q, k, mask, attention.hidden))

    return hook


def _read_cross(name: str, kept: dict[str, Tensor], tell: OnAttention) -> Callable[..., None]:
    def hook(attention: CrossAttention, inputs: tuple[Any, ...]) -> None:
        x, text, mask = inputs
        q = attention.q(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k = attention.kv(text).unflatten(-1, (2, -1, attention.head_dim))[:, :, 0].transpose(1, 2)
        tell(AttentionReading(name, kept["entering"], q, k, mask))

    return hook


def _keep_heads(kept: dict[str, Tensor], part: str, heads: int) -> Callable[..., None]:
    def hook(_linear: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        kept[part] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

    return hook


def _read_vit(name: str, kept: dict[str, Tensor], tell: OnAttention) -> Callable[..., None]:
    def hook(_attention: nn.Module, _inputs: Any, named: dict[str, Any], _output: Any) -> None:
        q, k = kept["q"], kept["k"]
        rotation = named.get("position_embeddings")
        if rotation is not None:
            # Only DINOv3 turns queries and keys, patches alone; by halves, not by pairs as the DiT.
            from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

            q, k = apply_rotary_pos_emb(q, k, *rotation)
        tell(AttentionReading(name, kept["entering"], q, k, None))

    return hook
