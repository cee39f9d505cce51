"""The base of every configuration section: frozen, strict about keys, documented in place."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One block of a run file. Unknown keys, infinities and NaN are refused; a field's docstring is
    its manual."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
