"""The documented families are those that are tested."""

from __future__ import annotations

from tests.architectures.families import FAMILIES
from tests.architectures.models import MODELS, PACKAGED
from tests.architectures.table import PAGE, page


def test_the_documented_table_is_the_tested_one() -> None:
    """After a change: `python -m tests.architectures.table`."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text


def test_a_row_is_named_once_and_every_model_has_one() -> None:
    names = [f.name for f in FAMILIES]
    assert len(set(names)) == len(names)
    assert {f.model for f in FAMILIES} == {*MODELS, *PACKAGED}
