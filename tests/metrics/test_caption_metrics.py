"""Caption metrics against the numbers of the published evaluation (pycocoevalcap 1.2) and by hand."""

import math
import random

import pytest

from mmpeft_ds.metrics.captions import bleu, caption_scores, cider, rouge_l

SAID = [
    "a man riding a wave on top of a surfboard",
    "a cat that is sitting on a table",
    "a red bus driving down a street",
]
THEIRS = [
    ["a man surfs a big wave in the ocean", "a surfer riding a wave on a board", "man on a surfboard riding a wave"],
    ["a cat sits on a wooden table", "the cat is sitting on top of a table"],
    [
        "a red double decker bus on a city street",
        "a bus driving down the street next to a building",
        "red bus driving down a street with people",
    ],
]
# what pycocoevalcap 1.2 printed for these captions
PUBLISHED = {
    "cider": 2.889588987324448,
    "bleu1": 0.8799999999648,
    "bleu2": 0.7999999999658182,
    "bleu3": 0.6177908489290264,
    "bleu4": 0.4927380556060222,
    "rouge_l": 0.7330991142473572,
}


def test_scores_are_those_of_the_published_evaluation():
    assert caption_scores(SAID, THEIRS) == pytest.approx(PUBLISHED, rel=1e-12)


def test_what_is_copied_scores_full_marks_and_what_is_foreign_none():
    copied = caption_scores([refs[0] for refs in THEIRS], [refs[:1] for refs in THEIRS])
    assert copied == pytest.approx(dict.fromkeys(PUBLISHED, 1.0) | {"cider": 10.0}, rel=1e-9)
    assert caption_scores(["x y z w v"] * 3, THEIRS) == pytest.approx(dict.fromkeys(PUBLISHED, 0.0), abs=1e-3)
    assert caption_scores([""] * 3, THEIRS) == pytest.approx(dict.fromkeys(PUBLISHED, 0.0), abs=1e-9)


def test_bleu_clips_repetition_and_punishes_brevity_against_the_nearest_reference():
    the = ["the"] * 7
    reference = ["the", "cat", "is", "on", "the", "mat"]
    assert bleu([the], [[reference]])[0] == pytest.approx(2 / 7)
    short, longer = ["the", "cat", "is"], [*reference, "there"]
    assert bleu([short], [[longer, reference]])[0] == pytest.approx(math.exp(1 - 6 / 3))


def test_rouge_l_follows_the_order_of_words():
    words, reference = ["police", "killed", "the", "gunman"], ["the", "gunman", "killed", "police"]
    assert rouge_l(reference, [reference]) == pytest.approx(1.0)
    assert rouge_l(words, [reference]) == pytest.approx(0.5)  # two of four in order


def test_cider_gives_nothing_for_words_that_every_image_has():
    common = [["a", "photo"], ["a", "photo"]]
    assert cider(common, [[c] for c in common]) == 0.0
    assert cider(common, [[["a", "photo", "of", "x"]], [["a", "photo", "of", "y"]]]) == 0.0


def test_scores_do_not_depend_on_the_order_of_images_or_references():
    order = random.Random(0).sample(range(3), 3)
    shuffled = caption_scores([SAID[i] for i in order], [THEIRS[i][::-1] for i in order])
    assert shuffled == pytest.approx(caption_scores(SAID, THEIRS), rel=1e-12)


# what pycocoevalcap 1.2 printed for these, its Java tokeniser included
ODD_SAID = [
    "a cup with 1 1/2 spoons (full)!!",
    "Mr. Smith's dog at 5 p.m. on 5th ave.",
    "",
    "a €5 bill [new] & 2 x 4",
    "he can't see the '90s sign",
]
ODD_THEIRS = [
    ["1 1/2 spoons in a cup (full)", "a cup full of sugar!!", "one cup"],
    ["Mr. Smith's dog walks at 5 p.m.", "a dog on 5th ave."],
    ["...", "a sign"],
    ["a 5€ bill, new & shiny", "money [new]"],
    ["the '90s sign he can't see", "a sign of the '90s"],
]
ODD_PUBLISHED = {
    "cider": 2.1787828629384727,
    "bleu1": 0.8947368420817176,
    "bleu2": 0.7071067811668449,
    "bleu3": 0.5503212081327672,
    "bleu4": 0.3364932442222876,
    "rouge_l": 0.714700698939339,
}


def test_raw_captions_with_marks_score_as_in_the_published_evaluation():
    """BLEU and CIDEr take a word with a no-break space for two, ROUGE-L for one; an empty caption is an empty word."""
    assert caption_scores(ODD_SAID, ODD_THEIRS) == pytest.approx(ODD_PUBLISHED, rel=1e-12)


@pytest.mark.parametrize(("said", "theirs"), [([], []), (["a"], []), (["a"], [[]])])
def test_a_caption_without_reference_is_refused(said, theirs):
    with pytest.raises(ValueError, match="none may be empty"):
        caption_scores(said, theirs)
