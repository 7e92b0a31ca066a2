"""Two ranks agree on what was cut, and end together where nothing is left to learn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpeft_ds import recipe as recipes
from tests.helpers import launch
from tests.helpers.runs import tiny_adapters

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.train_or_refuse"
LONG = "is it a big blue square and " * 12 + "what color is it"


def written(folder: Path, kind: str, change, monkeypatch, **sets) -> Path:
    """A recipe file of a kind of `tiny_adapters` over records that `change` has altered."""
    plain = tiny_adapters.pictured

    def altered(i: int):
        sample = plain(i)
        change(sample.record, i)
        return sample

    with monkeypatch.context() as patched:
        patched.setattr(tiny_adapters, "pictured", altered)
        folder.mkdir()
        raw = recipes.to_dict(tiny_adapters.recipe(folder, kind))
    raw["monitor"] = {"tensorboard": True, "samples": 0}
    raw["optim"] = {"epochs": 2, "max_steps": 0, "warmup": 0.0}
    raw["data"] |= sets
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def long_questions(record: dict, i: int) -> None:
    """Eight of twelve training samples and one of four in validation; one answer with a control token."""
    if i < 8 or i == 100:
        record["conversations"][0]["value"] = f"<image>\n{LONG}"
    if i == 11:
        record["conversations"][1]["value"] = "a red <|im_end|> circle"


def no_answers(record: dict, i: int) -> None:
    if i < 100:
        record["questions"][0]["answers"] = []


def with_captions(recipe: Path, folder: Path) -> Path:
    """The same recipe with a second source that has weight, in another run directory."""
    raw = yaml.safe_load(recipe.read_text())
    (answering,) = raw["data"]["sources"]
    captioning = {"name": "captioning", "num_beams": 1, "max_length": 8}
    raw["data"]["sources"] = [{**answering, "task": captioning}, answering]
    raw["run_dir"] = str(folder / "run")
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        cut = written(folder / "cut", "instruction", long_questions, patch)
        nothing = written(folder / "nothing", "answering", no_answers, patch, validation=[])
    half = with_captions(nothing, folder / "half")
    files = [cut, half, nothing, nothing]  # the last one again, from its checkpoint
    result = launch.run_forked(SCRIPT, *map(str, files), ranks=2)
    assert result.code == 0 and not result.killed, result.tail()
    return folder, result.output


def test_cut_texts_of_all_ranks_are_counted_in_metrics_on_the_board_and_in_the_table(ended):
    folder, output = ended
    run = folder / "cut" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["cut_texts"] == {"conversation": 8} and rows[2]["control_tokens"] == 1
    assert rows[-1]["cut_texts"] == {"conversation": 16} and rows[-1]["control_tokens"] == 2
    assert all(row["weight"] > 8 for row in rows), "every answer is learnt"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Scalars("cut_texts/conversation")[-1].value == 16
    assert board.Scalars("control_tokens/texts")[-1].value == 2
    assert board.Scalars("cut_texts/own-val/conversation")[-1].value == 1
    assert re.search(r"cut_texts +conversation 16", output) and re.search(r"control_tokens +2", output)
    assert "longer than backbone.max_text_length (60), cut to fit" in output
    assert "4 of 4 conversations, 1 conversation cut" in output


def test_a_run_in_which_nothing_enters_the_loss_ends_on_all_ranks_and_again_when_continued(ended):
    folder, output = ended
    refused = re.findall(r"rank (\d) \S*nothing/run: refused: (.*)", output)
    assert sorted(rank for rank, _ in refused) == ["0", "0", "1", "1"]
    assert all(
        "nothing of epoch 0 enters the loss: no question has an answer that counts" in why for _, why in refused
    )
    assert not (folder / "nothing" / "run" / "adapter").exists()


def test_a_source_that_gives_nothing_beside_others_is_told(ended):
    folder, output = ended
    said = "note: nothing of data.sources.1 in epoch 0 enters the loss: no question has an answer that counts"
    assert said in " ".join(output.split()) and "data.sources.0 in epoch" not in output
    assert (folder / "half" / "run" / "adapter").is_dir()
