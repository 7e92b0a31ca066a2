"""Captions: one drawn a visit, losses over tokens or captions, rows and scores."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.captions import caption_scores
from mmpeft_ds.tasks.captioning.priors import most_usual
from mmpeft_ds.tasks.captioning.task import Captioning, Options

RECORD = {"captions": ["a red bus", "  a bus drives down the street ", "", "bus"]}
WORDS = 9


def batch(task, *records, weights=None):
    """Labels as long as the caption has words, as a backbone would make them."""
    samples = []
    for i, record in enumerate(records):
        texts, targets = task.read(record, torch.Generator().manual_seed(i))
        samples.append(Sample(f"set/{i}", 1.0 if weights is None else weights[i], [], texts, targets, record))

    def collate(texts):
        labels = torch.full((len(texts), 8), -100)
        for row, text in enumerate(texts):
            count = len(text.target.split())
            labels[row, :count] = torch.arange(count)
        return {"labels": labels}

    return pack(samples, lambda i: {}, collate, task.collate)


def written(packed, seed=0, dtype=torch.float64):
    labels = packed.texts["labels"]
    logits = torch.randn(*labels.shape, WORDS, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return GenerationOutput(logits, labels, generated=[f"caption {i}" for i in range(len(labels))])


def three(weights=None, **options):
    task = Captioning(Options(**options), None)
    records = [{"captions": [c]} for c in ("a red bus", "a bus drives down the street", "bus")]
    return task, batch(task, *records, weights=weights)


def test_a_visit_draws_one_caption_by_its_generator():
    task = Captioning(Options(prompt="caption: "), None)
    drawn = [task.read(RECORD, torch.Generator().manual_seed(s))[0] for s in range(30)]
    assert {len(texts) for texts in drawn} == {1} and all(isinstance(t, Prompted) for (t,) in drawn)
    assert {t.target for (t,) in drawn} == {"a red bus", "a bus drives down the street", "bus"}
    assert {t.prompt for (t,) in drawn} == {"caption: "}
    again = task.read(RECORD, torch.Generator().manual_seed(3))[0]
    assert again == drawn[3]


def test_token_loss_is_the_mean_over_all_tokens_of_the_batch():
    task, packed = three(loss="token")
    out = written(packed)
    want = cross_entropy(out.logits.flatten(0, 1), out.labels.flatten(), ignore_index=-100)
    assert task.weight(packed) == 3 + 6 + 1
    torch.testing.assert_close(task.loss(out, packed) / task.weight(packed), want)


def test_caption_loss_weighs_short_and_long_captions_alike():
    task, packed = three(loss="caption")
    out = written(packed)
    each = [cross_entropy(logits, labels) for logits, labels in zip(out.logits, out.labels, strict=True)]
    assert task.weight(packed) == 3
    torch.testing.assert_close(task.loss(out, packed), sum(each))


def test_label_smoothing_is_that_of_torch():
    task, packed = three(smoothing=0.1)
    out = written(packed)
    want = cross_entropy(out.logits.flatten(0, 1), out.labels.flatten(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(task.loss(out, packed), want)


@pytest.mark.parametrize("loss", ["token", "caption"])
def test_weight_zero_is_absent_even_where_it_is_not_finite(loss):
    task, packed = three(weights=[1.0, 0.0, 0.5], loss=loss)
    out = written(packed)
    clean = task.loss(out, packed)
    out.logits[1] = float("nan")
    assert torch.equal(task.loss(out, packed), clean)
    assert task.weight(packed) == (3 + 0.5 if loss == "token" else 1.5)
    assert [r["sample_id"] for r in task.predict(out, packed)] == ["set/0", "set/2"]


@pytest.mark.parametrize("loss", ["token", "caption"])
def test_a_text_of_which_nothing_is_asked_counts_for_nothing(loss):
    task, packed = three(loss=loss)
    packed.texts["labels"][2] = -100
    out = written(packed)
    assert task.weight(packed) == (9 if loss == "token" else 2)
    assert task.loss(out, packed).isfinite()


def test_losses_are_float32_at_least():
    task, packed = three()
    assert task.loss(written(packed, dtype=torch.bfloat16), packed).dtype == torch.float32
    assert task.loss(written(packed), packed).dtype == torch.float64


def test_rows_carry_all_references_and_score():
    task = Captioning(Options(), None)
    packed = batch(task, RECORD, {"captions": ["a cat on a mat"]})
    out = written(packed)
    out.generated = ["a red bus", "a cat on a mat"]
    rows = task.predict(out, packed)
    assert rows[0]["references"] == RECORD["captions"] and rows[0]["prediction"] == "a red bus"
    scores = task.score(rows)
    assert set(scores) == {"cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"}
    assert scores["bleu1"] == pytest.approx(1.0) and task.main_metric in scores


def test_samples_of_one_picture_score_as_one_sample_with_all_captions():
    """One line a caption, as COCO's, Flickr30k's and MSR-VTT's files come; each id of a published file stays apart."""
    task, said = Captioning(Options(), None), ["a red bus", "a cat on a mat", "a dog"]
    captions = [["a red bus", "the bus is red"], ["a cat"], ["the dog runs", "a dog", "dogs"]]
    whole = [{"captions": c, "picture": f"{p}"} for p, c in enumerate(captions)]
    lines = [{"captions": [c], "picture": r["picture"]} for r in whole for c in r["captions"]]

    def rows(records):
        packed = batch(task, *records)
        out = written(packed)
        out.generated = [said[int(record["picture"])] for record in records]
        return task.predict(out, packed)

    assert task.score(rows(lines)) == task.score(rows(whole)) and task.scored(rows(lines)) == len(lines)
    train = [{"captions": ["a dog"]}]
    assert task.baselines(train, lines)["majority_cider"] == task.baselines(train, whole)["majority_cider"]
    apart = [{**line, "image_id": number} for number, line in enumerate(lines)]
    alone = [said[int(line["picture"])] for line in lines]
    assert task.score(rows(apart)) == caption_scores(alone, [line["captions"] for line in lines])
    assert task.score(rows(apart)) != task.score(rows(lines))


def test_new_images_need_no_captions():
    task = Captioning(Options(prompt="caption: "), None)
    record, targets = task.ask(["", "in short: "])
    assert len(targets) == 2 and task.prompted("in short: ") == Prompted("caption: in short: ")
    assert task.score([{"prediction": "a", "references": record["captions"]}]) == {}


def test_generation_is_told_one_length():
    assert Captioning(Options(), None).generation == {"num_beams": 5, "length_penalty": 1.0, "max_length": 20}
    longer = Captioning(Options(num_beams=1, max_new_tokens=7), None).generation
    assert longer == {"num_beams": 1, "length_penalty": 1.0, "max_new_tokens": 7}


def test_a_rank_without_pictures_writes_as_long_as_those_that_have_some():
    """Within `max_length` a shorter prompt leaves more to write, and all ranks write until the last one is done."""
    dummy = Prompted("a", "a")
    (text,), _ = Captioning(Options(prompt="what is it? "), None).read_all({"captions": ["x"]}, None)
    assert Captioning(Options(prompt="what is it? "), None).dummy_text(dummy) == Prompted(text.prompt, "a")
    assert Captioning(Options(), None).dummy_text(dummy).prompt == ""
    assert Captioning(Options(prompt="what is it? ", max_new_tokens=9), None).dummy_text(dummy) == dummy
    assert Captioning(Options(), None).dummy_text("a") == "a", "of a backbone that writes nothing"


@pytest.mark.parametrize("record", [{}, {"captions": "a"}, {"captions": []}, {"captions": [" "]}, {"captions": [1]}])
def test_a_record_of_the_wrong_shape_is_a_bad_sample(record):
    with pytest.raises(BadSample):
        Captioning(Options(), None).read(record, torch.Generator())


@pytest.mark.parametrize(
    "options", [{"loss": "word"}, {"smoothing": 1.0}, {"num_beams": 0}, {"max_length": 0}, {"max_new_tokens": -1}]
)
def test_impossible_options_are_refused_in_one_line(options):
    with pytest.raises(BadInput) as error:
        Captioning(Options(**options), None)
    assert "\n" not in str(error.value)


def test_a_picture_whose_captions_are_not_public_is_described_and_counts_nowhere():
    task = Captioning(Options(), None)
    texts, targets = task.read_all({"captions": []}, torch.Generator())
    assert texts == [Prompted("", "")] and task.collate(targets)["known"].tolist() == [0]
    with pytest.raises(BadSample):
        task.read({"captions": []}, torch.Generator())


def test_captions_without_a_model_are_the_usual_one_and_drawn_ones():
    train = [{"captions": ["a dog", "a dog "]}, {"captions": ["a cat on a mat"]}, {"captions": []}]
    test = [{"captions": ["a dog", "the dog"]}, {"captions": ["a bird"]}, {"captions": []}]
    task = Captioning(Options(), None)
    scores = task.baselines(train, test)
    known = [r["captions"] for r in test if r["captions"]]
    assert {k: v for k, v in scores.items() if k.startswith("majority_")} == {
        f"majority_{name}": value for name, value in caption_scores(["a dog"] * 2, known).items()
    }
    assert {k.split("_", 1)[0] for k in scores} == {"majority", "random"} and task.baselines(train, test) == scores
    assert task.baselines(train, [{"captions": []}]) == task.baselines([{}], test) == {}


def test_of_equally_frequent_captions_the_one_of_usual_words_is_the_majority():
    counts = Counter(["zebra", "a red bus", "a red car", "the bird"])
    assert most_usual(counts) == "a red bus"  # two of its three words are in another one too
    assert most_usual(counts + Counter(["zebra"])) == "zebra"
