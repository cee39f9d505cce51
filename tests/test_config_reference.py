"""docs/configuration.md says what the schema says."""

from __future__ import annotations

from pathlib import Path

from dsr_scale.config.reference import reference
from dsr_scale.config.run import RunConfig
from dsr_scale.config.schema_paths import leaf_paths

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def test_the_page_ends_with_the_current_reference() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith("\n\n" + reference()), (
        "docs/configuration.md is behind the schema: replace its last section with the output of "
        "`python -m dsr_scale.config.reference`"
    )


def test_every_field_is_in_the_reference_with_a_meaning() -> None:
    text = reference()
    for path in leaf_paths(RunConfig):
        assert f"`{path.rpartition('.')[2]}`" in text or f"`{path}`" in text or ".kind" in path, (
            path
        )
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        assert not row.endswith("|  |"), row
