"""What holds for every process that runs tests."""

import functools
import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """While modules are imported, the garbage collector would take a fifth of the time and find nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Full collections of garbage pass over what the imports have made: hundreds of thousands of objects that stay.

    A template is compiled once: peft makes one of the same text for the model card of every adapter that it saves.
    """
    gc.collect()
    gc.freeze()
    if jinja2 := sys.modules.get("jinja2"):
        jinja2.Template = functools.cache(jinja2.Template)
