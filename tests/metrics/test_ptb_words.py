"""Words of captions against those of the published evaluation's Java program.

`ptb_words.tsv.gz` holds texts and the words that `edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase` of
`stanford-corenlp-3.4.1.jar` (in the wheel of pycocoevalcap 1.2) printed for them on Java 17, without the tokens that
the evaluation drops. Each text was a line of its own between lines "x". They were drawn from 320,000 compared:
every symbol of ASCII, Latin-1 and the currency block in 42 surroundings, all pairs and triples of ASCII marks,
abbreviations, contractions and numbers in up to 36 surroundings, random strings, and lines of English text; and from
1.5 million more, captions with odd words among them, entities, tags and addresses.
"""

import gzip
from pathlib import Path

import pytest

from mmpeft_ds.metrics.ptb import tokenize, tokenize_all

GOLDEN = Path(__file__).with_name("ptb_words.tsv.gz")


def pairs():
    lines = gzip.decompress(GOLDEN.read_bytes()).decode().split("\n")
    return [tuple(line.split("\t")) for line in lines if line]


def test_words_are_those_of_the_published_evaluation():
    known = pairs()
    assert len(known) > 7000
    wrong = {text: (words, " ".join(tokenize(text))) for text, words in known if " ".join(tokenize(text)) != words}
    assert not wrong


def test_the_comparison_sees_a_rule_that_is_missing():
    plain = {text: " ".join(text.lower().split()) for text, _ in pairs()}
    assert sum(plain[text] != words for text, words in pairs()) > 5000


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn't black-and-white.", "a man 's dog is n't black-and-white"),
        ("Two people (one in red), running; fast!", "two people -lrb- one in red -rrb- running fast"),
        ("I can't, you cannot — they’re gonna", "i ca n't you can not they 're gon na"),
        ("at 10:30, 3.5 feet & 50%", "at 10:30 3.5 feet & 50 %"),
        ("a dog's canister, the dogs' cannery", "a dog 's canister the dogs cannery"),
        ("Wow!!! Really?? No!?", "wow !!! really ?? no !?"),
        ("Mr. Lee at 5 p.m. in the U.S.", "mr. lee at 5 p.m. in the u.s."),
        ("€5, 5¢, £3 and ½ at 70°F", "$ 5 5 cents # 3 and 1/2 at 70 ° f"),
        ("'tis the '90s, give 'em rock 'n' roll", "'t is the '90s give 'em rock 'n' roll"),
        ("हिन्दी में, ไทย", "हिन्दी में ไทย"),
        ("a\nline\r\nbreak\u2028here", "a line break here"),
        ("we stay at the B&Bx.", "we stay at the b&b x."),
        ("he is (>-`) or (`->)", "he is -lrb->-`-rrb- or -lrb- > -rrb-"),
        ("write to a@b.com'\u3000", "write to a@b.com'"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_words_of_captions(caption, words):
    assert tokenize(caption) == words.split()


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ("apples etc.", "apples etc."),
        ("apples etc.)", "apples etc. -rrb-"),
        ("apples etc. ", "apples etc."),
        ("apples etc.5", "apples etc. .5"),
        ("apples etc..", "apples etc."),
        ("figs co. a", "figs co. a"),
        ("a dog at no.", "a dog at no"),
        ("a dog.", "a dog"),
    ],
)
def test_an_abbreviation_at_the_end_of_all_captions_keeps_its_period_and_gives_another(last, words):
    assert list(tokenize_all(["x", last])) == [["x"], words.split()]  # as the program printed them


def test_characters_that_the_program_does_not_know_part_words():
    assert tokenize("a dog \N{DOG FACE}wags") == ["a", "dog", "wags"]
    assert tokenize("a\N{ZERO WIDTH SPACE}b") == ["a", "b"]


def test_a_fraction_with_a_whole_number_is_one_word_with_a_no_break_space():
    assert tokenize("1 1/2 cups") == ["1\xa01/2", "cups"]


def test_a_period_at_the_end_of_a_caption_looks_at_how_the_next_one_begins():
    lines = ["plan b.", "A dog", "plan b.", "a dog", "vitamin c.", "", "The cat", "no.", "5 dogs", "no.", "", "5"]
    words = ["plan b", "a dog", "plan b.", "a dog", "vitamin c", "", "the cat", "no.", "5 dogs", "no", "", "5"]
    assert [" ".join(each) for each in tokenize_all(lines)] == words  # as the program printed them
    assert tokenize("plan b.") == ["plan", "b."]
    assert list(tokenize_all([])) == [[]] and list(tokenize_all(["", ""])) == [[], []]
