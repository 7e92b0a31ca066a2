"""What is said about texts that were cut, before and after training, and in prediction."""

import pytest
import torch

from data_prep import verify
from mmpeft_ds import adapter, recipe
from mmpeft_ds.data.batch import CollatedTexts, Sample, pack
from mmpeft_ds.engine import plan
from mmpeft_ds.engine.assembly.resolve import resolve
from mmpeft_ds.engine.text_counts import TextCounts, note, nothing_learnt
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.predict import predict
from tests.helpers.runs import tiny_adapters

LONG = "is it a big blue square and " * 4 + "what color is it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe of task vqa; a third of its questions is long, one holds a control token."""
    path, plain = tmp_path_factory.mktemp("texts"), tiny_adapters.pictured

    def altered(i):
        sample = plain(i)
        if i % 3 == 0:
            sample.record["questions"][0]["question"] = LONG
        if i == 1:
            sample.record["questions"][0]["question"] = "is it [SEP] red"
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_adapters, "pictured", altered)
        made = tiny_adapters.recipe(path, "vqa")
    (path / "recipe.yaml").write_text(recipe.to_yaml(made))
    tiny_adapters.export(path, "vqa")
    return path


def test_check_counts_the_texts_of_every_source_before_training(folder, capsys):
    report = plan.make(resolve(recipe.load(folder / "recipe.yaml")))
    train, val = report["texts"]
    assert (train["split"], train["looked_at"], train["cut_texts"], train["control_tokens"]) == (
        "train", 12, {"question": 4}, 1,
    )  # fmt: skip
    assert val["cut_texts"] == {"question": 1} and val["control_tokens"] == 0
    plan.show(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "12 samples: 4 questions longer than backbone.max_text_length (19), cut to fit" in said
    assert "1 text with control tokens" in said
    longer = resolve(recipe.load(folder / "recipe.yaml", ["backbone.max_text_length=38"]))
    assert [row["cut_texts"] for row in plan.make(longer)["texts"]] == [{}, {}]


def test_verify_with_a_recipe_counts_all_texts_of_the_data_set(folder, tmp_path, capsys):
    assert verify.main([str(folder / "data"), "--processes", "1", "--recipe", str(folder / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    assert "(train), 12 samples: 4 questions longer than" in out and "(val), 4 samples: 1 question longer" in out
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput, match="does not read"):
        verify.main([str(tmp_path / "other"), "--recipe", str(folder / "recipe.yaml")])


def test_check_counts_every_answer_that_training_may_draw_and_each_question_once(tmp_path, monkeypatch):
    plain = tiny_adapters.pictured

    def altered(i):
        sample = plain(i)
        sample.record["questions"][0] |= {"question": LONG, "answers": ["red", "red", LONG, "blue"]}
        return sample

    monkeypatch.setattr(tiny_adapters, "pictured", altered)
    made = tiny_adapters.recipe(tmp_path, "answering")
    assert plan.make(resolve(made))["texts"][0]["cut_texts"] == {"question": 12, "answer": 12}


def test_a_prediction_says_how_much_of_a_text_was_not_read(folder):
    loaded = adapter.load(folder / "adapter")
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    long, short = loaded.predict([picture], [[LONG, "is it red"]])
    words = len(loaded.backbone._tokenizer(LONG)["input_ids"])
    assert long["cut_tokens"] == words - 19 and "cut_tokens" not in short
    answers = predict(folder / "adapter", [], [LONG])
    assert answers.cut == []


def test_a_prediction_says_how_many_control_tokens_were_read_as_characters(folder):
    loaded = adapter.load(folder / "adapter")
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    token = loaded.backbone._tokenizer.all_special_tokens[-1]
    with_two, without = loaded.predict([picture], [[f"is {token} it {token} red", "is it red"]])
    assert with_two["control_tokens"] == 2 and "control_tokens" not in without


def test_only_texts_of_weight_are_counted():
    def collate(texts):
        return CollatedTexts({"ids": torch.zeros(len(texts), 1)}, torch.tensor([[3, 0, 0], [0, 1, 1], [9, 9, 9]]))

    samples = [Sample("a", 1.0, [], ["x", "y"], [0, 0]), Sample("b", 0.0, [], ["z"], [0])]
    packed = pack(samples, lambda images: {}, collate, lambda targets: {})
    assert packed.changed_texts() == [1, 1, 1]
    plain = pack(samples, lambda images: {}, lambda texts: {"ids": torch.zeros(3, 1)}, lambda targets: {})
    assert plain.changed_texts() == [0, 0, 0]


def test_the_message_names_the_option_that_was_too_small(folder):
    resolved = resolve(recipe.load(folder / "recipe.yaml"))
    task, counts = resolved.train[0].task, TextCounts()
    counts.add(task, [2, 0, 1])
    counts.add(task, [1, 0, 0])
    assert counts == TextCounts({"question": 3}, 1)
    assert note(resolved.backbone, [task], counts) == (
        "3 questions longer than backbone.max_text_length (19), cut to fit; 1 text with "
        "control tokens of the tokenizer, read as words"
    )
    why = nothing_learnt(resolved.backbone, [task], counts)
    assert why.startswith("no question has an answer that counts; 3 questions cut")
    assert "Raise backbone.max_text_length (19)" in why
    assert "show.py" in nothing_learnt(resolved.backbone, [task], TextCounts())
