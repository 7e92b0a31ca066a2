"""METEOR and SPICE of captions by the published package (extra `eval`, pycocoevalcap), which runs Java programs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mmpeft_ds.metrics.captions import joined_words

NAMES = ("meteor", "spice")
# SPICE parses with models that its package fetches when it is first used; offline it cannot.
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

Pair = tuple[str, Sequence[str]]


def missing(names: Sequence[str]) -> str:
    """Requirements of these metrics that are not installed, in one line; empty where nothing is missing."""
    who = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''}"
    if not (package := importlib.util.find_spec("pycocoevalcap")):
        return f"{who} the published package: pip install 'mmpeft_ds[eval]', and Java."
    if not shutil.which("java"):
        return f"{who} Java: install a runtime (Debian: apt install default-jre-headless)."
    library = Path(next(iter(package.submodule_search_locations or [""]))) / "spice" / "lib"
    if "spice" in names and not all((library / file).is_file() for file in _SPICE_MODELS):
        return (
            f"spice needs {' and '.join(_SPICE_MODELS)} of Stanford CoreNLP 3.6.0 in {library}; with a network, "
            "python -c 'from pycocoevalcap.spice.spice import Spice; Spice()' fetches them."
        )
    return ""


def scores_where_possible(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> tuple[dict[str, float], str]:
    """(scores, why some are left out) of `names`, or of all metrics where None; see `score` for the pairs."""
    possible = [name for name in names or NAMES if not missing([name])]
    left_out = [name for name in names or NAMES if name not in possible]
    return score(pairs, possible), missing(left_out) if left_out else ""


def score(pairs: Sequence[Pair], names: Sequence[str]) -> dict[str, float]:
    """Scores by name.

    Args:
        pairs: (caption, its references), raw text; the words are those of `metrics.ptb`.
    """
    words, their_words = joined_words([caption for caption, _ in pairs], [references for _, references in pairs])
    said, theirs = {number: [caption] for number, caption in enumerate(words)}, dict(enumerate(their_words))
    scores = {}
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints its progress
            scores[name] = float(_scorer(name)().compute_score(theirs, said)[0])
    return scores


def _scorer(name: str) -> Callable:
    if name == "meteor":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor
    from pycocoevalcap.spice.spice import Spice

    return Spice
