"""The diffusion transformer: widths, registers, conditioning. Sizes of the papers are presets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from dsr_scale.config.section import Section


class RegistersConfig(Section):
    """Diffusion registers (DSR §1.5): learnable tokens that join the sequence at a middle block."""

    count: int = Field(default=36, ge=0)
    """K; 0 is the baseline without registers, bit for bit."""
    start: int | None = Field(default=None, ge=0)
    """First block that sees them; None is ceil(2·depth/7), the published rule."""
    masked: bool = False
    """Hide them from every other token: the control that computes the baseline with their rows."""


class HeadConfig(Section):
    """The wide, shallow DDT head of RAE-DiT^DH, modulated per token by the body's output."""

    width: int = Field(default=2048, gt=0)
    """E, width of the head."""
    depth: int = Field(default=2, gt=0)
    """Blocks of the head."""
    heads: int = Field(default=16, gt=0)
    """Attention heads; they divide the width."""


class ClassConditioning(Section):
    """A learned vector per class, added to the timestep embedding."""

    kind: Literal["class"] = "class"
    num_classes: int = Field(default=1000, gt=0)
    """Classes, counted from 0; the null class is one more."""


class CrossAttentionConditioning(Section):
    """Every body block attends to the caption's tokens; their pooled mean joins the timestep embedding."""

    kind: Literal["cross_attention"] = "cross_attention"


class InContextConditioning(Section):
    """The caption's tokens are part of the sequence; their pooled mean joins the timestep embedding."""

    kind: Literal["in_context"] = "in_context"


class QueryAdaLNConditioning(Section):
    """The published text-to-image setting: one learned query per image token reads the caption and
    modulates that token (Scale-RAE, docs/method.md §2); registers see the mean (docs/method.md §6)."""

    kind: Literal["query_adaln"] = "query_adaln"
    connector_depth: int = Field(default=2, gt=0)
    """Transformer layers through which the queries read the caption."""


AttentionVariant = Literal["plain", "bias", "off_by_one", "gated"]
"""What stands beside the softmax of self-attention."""

ConditioningConfig = Annotated[
    ClassConditioning | CrossAttentionConditioning | InContextConditioning | QueryAdaLNConditioning,
    Field(discriminator="kind"),
]


class ModelConfig(Section):
    """RAE-DiT, or RAE-DiT^DH when `head` is given."""

    preset: str | None = None
    """A published size (`DiT-XL`, `DiT-DH-XL`, `T2I-2.4B`, …): fills width, depth, heads and head."""
    width: int = Field(default=0, ge=0)
    """D, width of the body; filled from the preset when there is one."""
    depth: int = Field(default=0, ge=0)
    """Blocks of the body; filled from the preset."""
    heads: int = Field(default=0, ge=0)
    """Attention heads of the body; filled from the preset."""
    head: HeadConfig | None = None
    patch: int = Field(default=1, gt=0)
    """Latent cells per token and axis: 1 for RAE and pixels, 2 for a VAE."""
    registers: RegistersConfig = RegistersConfig()
    conditioning: ConditioningConfig = CrossAttentionConditioning()
    qk_norm: bool = False
    """RMSNorm on queries and keys of each head; off in the published models."""
    attention: Literal["sdpa", "flash"] = "sdpa"
    """`flash` calls the flash-attn package (extra `flash`); `sdpa` is torch's own."""
    attention_variant: AttentionVariant = "plain"
    """Other remedies for outliers, in every block of body and head (docs/method.md §2): `bias` is one
    learned key and value per head, `off_by_one` adds 1 to the softmax's denominator, `gated` scales
    each head's output by a sigmoid of the block's input."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A head that was left to the preset stays out of the dump, where null would say none."""
        values = dump(self)
        if "head" not in self.model_fields_set:
            values.pop("head", None)
        return values
