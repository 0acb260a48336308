"""The documentation and the table in code say the same."""

from pathlib import Path

import pytest

from flask_muset.metrics.config import KEYS, PREFIX
from flask_muset.metrics.registry import markdown_table

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture
def page():
    if not PAGE.exists():
        pytest.skip("the documentation is not here")
    return PAGE.read_text("utf-8")


def test_the_table_is_the_registrys(page):
    """Run `python -c 'from flask_muset.metrics.registry import *; print(markdown_table())'`."""
    assert markdown_table() in page


def test_every_key_is_described(page):
    """All keys with their defaults."""
    for name, key in KEYS.items():
        default = f'"{key.default}"' if isinstance(key.default, str) else key.default
        assert f"| {PREFIX}{name} | {default} |" in page
