"""How every weight is split over tensor-parallel ranks: one table, first match wins.

The model knows nothing of this. A rule names modules by pattern and says which part each rank
holds; `tensor_layers` has the module that puts a rule to work. Under sequence parallelism (`sp`)
each rank holds its share of the tokens between the blocks' matrix products, so a weight that acts on
tokens one by one sees part of the gradient there, and sums it.

| part | what a rank holds | gradient |
|---|---|---|
| COLUMN | some output features, of each of `parts` fused projections; some heads' keys | its own |
| ROW | some input features; the bias whole | its own; bias as TOKENS |
| MODULATION | some output features of AdaLN, gathered for all blocks at once | its own |
| HEADS | all, applied to this rank's heads | summed |
| TOKENS | all, applied to this rank's tokens | summed under `sp`, else equal |
| WHOLE | all, applied to everything | equal on every rank |

AdaLN is a third of the parameters. With one condition per image it is split; with one per token
(queries, and every block of a DDT head) a split would move six times the tokens' own bytes, so it
stays whole and works on the rank's tokens.
"""

from __future__ import annotations

from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple

from dsr_scale.base.boxes import Split
from dsr_scale.config.derive import ModelShape


class Part(Enum):
    """What a tensor rank holds of a module."""

    COLUMN = "column"
    ROW = "row"
    MODULATION = "modulation"
    HEADS = "heads"
    TOKENS = "tokens"
    WHOLE = "whole"


class Rule(NamedTuple):
    """One line of the table."""

    modules: str
    """Pattern of module paths."""
    part: Part
    parts: int = 1
    """Projections fused in one COLUMN: q, k, v; the halves of SwiGLU."""
    on_tokens: bool = False
    """COLUMN, ROW: input or output is the sequence of the blocks, which `sp` divides."""


RULES = (
    Rule("blocks.*.attn.qkv", Part.COLUMN, parts=3, on_tokens=True),
    Rule("blocks.*.attn.proj", Part.ROW, on_tokens=True),
    Rule("blocks.*.attn.?_norm", Part.HEADS),
    Rule("blocks.*.attn.gate", Part.COLUMN, on_tokens=True),
    Rule("blocks.*.attn.sink", Part.COLUMN),
    Rule("blocks.*.cross.q", Part.COLUMN, on_tokens=True),
    Rule("blocks.*.cross.kv", Part.COLUMN, parts=2),
    Rule("blocks.*.cross.proj", Part.ROW, on_tokens=True),
    Rule("blocks.*.mlp.w12", Part.COLUMN, parts=2, on_tokens=True),
    Rule("blocks.*.mlp.w3", Part.ROW, on_tokens=True),
    Rule("blocks.*.adaLN_modulation.1", Part.MODULATION),
    Rule("blocks.*.norm*", Part.TOKENS),
    Rule("s_projector", Part.TOKENS),
    # The caption's own blocks: split like the body's, on text and queries that are never divided.
    Rule("y_embedder.*.attn.qkv", Part.COLUMN, parts=3),
    Rule("y_embedder.*.attn.proj", Part.ROW),
    Rule("y_embedder.*.cross.q", Part.COLUMN),
    Rule("y_embedder.*.cross.kv", Part.COLUMN, parts=2),
    Rule("y_embedder.*.cross.proj", Part.ROW),
    Rule("y_embedder.*.mlp.w12", Part.COLUMN, parts=2),
    Rule("y_embedder.*.mlp.w3", Part.ROW),
    # What is left is small or runs once per image. Tokens are divided after the patch embedding and
    # the registers, and whole again before the final layer.
    Rule("y_embedder*", Part.WHOLE),
    Rule("t_embedder*", Part.WHOLE),
    Rule("?_embedder*", Part.WHOLE),
    Rule("final_layer*", Part.WHOLE),
    Rule("", Part.WHOLE),
)
"""The last line is the model itself: the registers. Position tables hold nothing learned and are no
parameters; every rank makes them for all rows, which attention sees whole."""


class TensorPlan:
    """The table for one network."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    def rule(self, module: str) -> Rule:
        """The rule of a module path."""
        for rule in RULES:
            if fnmatchcase(module, rule.modules):
                if rule.part is Part.MODULATION and self._per_token(module):
                    return Rule(rule.modules, Part.TOKENS)
                return rule
        raise AssertionError(f"no rule for {module}")

    def split(self, parameter: str, rank: int, ranks: int) -> Split | None:
        """Where this rank's part of a parameter lies in the whole; None when it holds all of it."""
        module, _, leaf = parameter.rpartition(".")
        rule = self.rule(module)
        if ranks > 1 and rule.part in (Part.COLUMN, Part.MODULATION):
            return Split(dim=0, parts=rule.parts, rank=rank, ranks=ranks)
        if ranks > 1 and rule.part is Part.ROW and leaf == "weight":
            return Split(dim=1, parts=1, rank=rank, ranks=ranks)
        return None

    def _per_token(self, module: str) -> bool:
        """Whether the AdaLN at this path has a condition of its own for each token."""
        block = int(module.split(".")[1])
        return block >= self._shape.depth or self._shape.conditioning.kind == "query_adaln"
