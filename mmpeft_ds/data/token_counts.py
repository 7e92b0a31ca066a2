"""Token counts from which the cost of a sample follows: a backbone counts them, packing plans by them."""

from typing import NamedTuple


class TokenCounts(NamedTuple):
    """Counts of one sample, or arrays of many.

    Attributes:
        tokens: that the language model reads, of all texts of the sample.
        of_images: of its images, each counted once.
        pairs: squares of the lengths of its texts, summed: pairs of tokens that attention compares.
        patches: of its images, which the vision tower reads.
        patch_pairs: squares of the patches that it reads together, summed.
    """

    tokens: int
    of_images: int
    pairs: int
    patches: int = 0
    patch_pairs: int = 0
