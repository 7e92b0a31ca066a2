"""Match of a backbone's outputs with a task's inputs, from what their options declare, before torch is imported.

Both declare words, such as "image and text features", by the setting that they depend on: "form: retrieval",
"form: retrieval, negatives: all", or "" for what holds whatever the options say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Words = tuple[str, ...]
ByOption = Mapping[str, Words]


def chosen(by_option: ByOption, options: Any, setting: str = "") -> Words:
    """The words that hold for `options`, each once.

    Args:
        options: an instance, or the class, whose defaults then count.
        setting: what to take in place of what `options` say.
    """
    changed = _pairs(setting)
    held = [
        word
        for key, words in by_option.items()
        if all(changed.get(name, str(getattr(options, name))) == value for name, value in _pairs(key).items())
        for word in words
    ]
    return tuple(dict.fromkeys(held))


def settings(by_option: ByOption, options: type, fits: Callable[[Words], bool]) -> list[str]:
    """The settings, each beside the defaults of all other options, whose words fit; none that only adds to another."""
    fitting = [setting for setting in by_option if fits(chosen(by_option, options, setting))]
    return [s for s in fitting if not any(s != other and set(_pairs(other)) < set(_pairs(s)) for other in fitting)]


def described(name: str, settings: list[str]) -> str:
    """A component with the settings that make it fit, for a message: "blip with form: captioner or form: vqa"."""
    return name if "" in settings else f"{name} with {' or '.join(settings)}"


def _pairs(setting: str) -> dict[str, str]:
    return dict(part.split(": ") for part in setting.split(", ") if part)
