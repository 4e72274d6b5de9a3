"""The page of findings is what its generator writes, and leaves none out."""

import findings_page
from findings_page import ALIASES, PAGE, constants, page

from bpdiag.diagnosis import DIAGNOSES
from bpdiag.diagnosis.flow import vanishing


def test_the_page_on_disk_is_the_one_generated():
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_finding_has_another_name_and_no_other_has():
    assert set(ALIASES.values()) == DIAGNOSES.keys()


def test_every_threshold_says_why():
    told = {name: why for generator in DIAGNOSES.values() for name, _, why in constants(generator)}
    assert [name for name, why in told.items() if not why] == []
    assert {"LUCK", "LEAST_TRAVEL", "ADAM_DECADES"} <= {name for name, _, _ in constants(vanishing)}


def test_an_edited_page_is_noticed(monkeypatch):
    before = page()
    monkeypatch.setitem(findings_page.ALIASES, "another word", "vanishing")
    assert page() != before
