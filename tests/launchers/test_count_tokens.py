"""Tokens are counted by a command before a run, once, and a start reads what it has kept."""

import subprocess
import sys

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import pack_forecast, token_counts
from mmpeft_ds.engine.assembly.resolve import resolve
from tests.helpers.runs import tiny_talk


def count(recipe, *options):
    command = [sys.executable, "launchers/count_tokens.py", "--recipe", recipe, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_the_command_has_counted_is_what_a_check_and_a_start_read(tmp_path, monkeypatch):
    tiny_talk.write(tmp_path)
    recipe = tiny_talk.recipe(tmp_path, "recipe", data__pack=160)
    done = count(recipe)
    assert done.returncode == 0, done.stderr
    resolved = resolve(recipes.load(recipe))
    (source,) = resolved.train
    counts = token_counts.read(token_counts.file_of(resolved, source), tiny_talk.SAMPLES)
    assert counts[:, 0].min() > 5 and f"30 samples, {counts[:, 0].sum():,} tokens, {counts[:, 3].sum():,} patches" in (
        done.stdout
    )
    monkeypatch.setattr(token_counts, "count", None)  # nothing is counted again
    assert {row["counted"] for row in pack_forecast.make(resolved, [1, 3])} == {tiny_talk.SAMPLES}


def test_without_packing_the_command_says_what_to_set(tmp_path):
    tiny_talk.write(tmp_path, samples=2)
    done = count(tiny_talk.recipe(tmp_path, "recipe"))
    assert done.returncode == 2 and "data.pack: 0" in done.stderr and "Traceback" not in done.stderr
