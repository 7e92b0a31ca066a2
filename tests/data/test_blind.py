"""Texts without class names: all of them, by words, never by a sample's own label."""

import pytest

from mmpeft_ds.data.blind import ClassNameFilter
from mmpeft_ds.errors import BadInput


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a red Circle on a table", "a red on a table"),
        ("two circles and a sea lion", "two and a"),  # plural; the longer name first
        ("a sea-lion's tail", "a tail"),
        ("a lion, a sea", "a , a sea"),
        ("the circles' encircled category", "the ' encircled category"),  # a name inside a word stays
        ("american pit  bull\nterrier", ""),
        ("an american pit lion bull terrier", "an"),  # a name that comes together around another
        ("nothing of it", "nothing of it"),
    ],
)
def test_every_class_name_goes_and_nothing_else(text, left):
    assert ClassNameFilter(["circle", "lion", "Sea_Lion", "american_pit_bull_terrier"])(text) == left


def test_signs_that_are_no_letters_are_names_too():
    assert ClassNameFilter(["c++", "?!"])("why ?! in c++ code") == "why in code"


@pytest.mark.parametrize("labels", [None, [], [" "]])
def test_without_class_names_it_is_refused(labels):
    with pytest.raises(BadInput, match="no class names"):
        ClassNameFilter(labels)
