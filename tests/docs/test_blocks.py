"""Every Python block of the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: The guide's blocks run in processes of their own; see test_guide.py.
PAGES = [
    ROOT / "README.md",
    ROOT / "extensions" / "README.md",
    *sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "guide.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page):
    """The blocks of a page run one after the other in one namespace."""
    namespace = {"__name__": "documentation"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M):
        exec(compile(block, str(page), "exec"), namespace)
