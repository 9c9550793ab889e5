"""`docs/modules.md` is what the tool would write, and names every module of the notes."""

from __future__ import annotations

from tests.zoo import notes
from tools import document_modules


def test_the_page_is_current() -> None:
    assert document_modules.PAGE.read_text() == document_modules.page()


def test_every_kind_of_module_has_a_section() -> None:
    shown = {name for section in document_modules.SECTIONS for name in section.cases}
    kinds = {case.name.split("_")[0] for case in notes.CASES} - {"downsampling1d", "downsampling2d", "downsampling3d"}
    assert kinds - {name.split("_")[0] for name in shown} == {"downsampling"}
    assert shown <= set(document_modules.models())
