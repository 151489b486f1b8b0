"""The tables of measurements in docs/ are those of the results that are committed."""

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_tables_are_generated() -> None:
    """python tools/document_results.py"""
    pages = runpy.run_path(str(REPOSITORY / "tools" / "document_results.py"))["pages"]()
    assert pages
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, page
