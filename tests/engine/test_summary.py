"""The final table: rounded, nothing empty, scores beside what needs no model."""

import pytest

from mmpeft_ds import console
from mmpeft_ds.engine import summary
from mmpeft_ds.metrics.retrieval import chance, recall, retrieval_scores
from mmpeft_ds.tasks.instruction.options import Options as InstructionOptions
from mmpeft_ds.tasks.instruction.task import Instruction
from mmpeft_ds.tasks.retrieval.options import Options as RetrievalOptions
from mmpeft_ds.tasks.retrieval.task import Retrieval

METRICS = {
    "steps": 46,
    "train_loss": 0.7574734687805176,
    "train_seconds": 173.900599564,
    "trainable_parameters": 367105,
    "peak_rss_mib": [1144, 998],
    "best": 0.5432098765432,
    "best_step": 18,
    "best_metric": "accuracy",
    "best_of": "own-val",
    "skipped_steps": 0,
    "bad_samples": {},
    "world_size": 2,
}


def test_the_table_is_rounded_says_what_is_best_and_leaves_out_what_is_empty():
    table = summary.table(METRICS, {"accuracy": 0.54321, "loss": 1.0}, {"majority": 0.38})
    assert max(map(len, table.splitlines())) <= 80
    assert "train_loss            0.7575" in table and "367,105" in table and "1,144, 998" in table
    assert "best accuracy         0.5432 (step 18, own-val)" in table
    assert "bad_samples" not in table and "skipped_steps" not in table and "{" not in table
    assert "majority" in table and "0.3800" in table, "the baseline stands beside the score"


def test_a_best_score_of_zero_is_said_as_well():
    assert "best accuracy         0 (step 18, own-val)" in summary.table(METRICS | {"best": 0.0}, {}, {})


def test_a_head_that_is_solved_names_no_step():
    table = summary.table(METRICS | {"best": 1.0, "best_step": 0}, {"accuracy": 1.0}, {})
    assert "best accuracy         1 (own-val)" in table and "step" not in table.split("best accuracy")[1]


def test_a_run_without_validation_has_a_table_too():
    metrics = METRICS | {
        "best": None,
        "best_metric": None,
        "best_of": None,
        "best_step": 0,
        "bad_samples": {"image": 3},
    }
    table = summary.table(metrics, {}, {})
    assert "best" not in table and "image 3" in table


def test_a_baseline_of_another_metric_than_the_main_one_stands_beside_its_own(monkeypatch):
    """`majority` of conversations is an exact match; it stood beside the perplexity."""
    talk = {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "yes"}]}
    baselines = Instruction(InstructionOptions(), None).baselines([talk], [talk])
    text = console.score_text({"perplexity": 3.0, "exact_match": 0.5}, baselines, "t")
    perplexity, exact = (line for line in text.splitlines() if "perplexity" in line or "exact" in line)
    assert "1.0000" in exact and "1.0000" not in perplexity


def test_chance_recall_is_what_random_rankings_give():
    captions = [2, 1, 3, 1, 2, 4, 1]
    owners = [i for i, count in enumerate(captions) for _ in range(count)]
    import random

    draw, texts, pictures = random.Random(0), [], []
    for _ in range(4000):
        order = draw.sample(range(len(owners)), len(owners))
        i = draw.randrange(len(captions))
        texts.append(1 + next(place for place, t in enumerate(order) if owners[t] == i))
        pictures.append(draw.randint(1, len(captions)))
    expected = chance(captions)
    for prefix, found in (("txt_", texts), ("img_", pictures)):
        for name, value in recall(found, prefix).items():
            if "mdR" not in name:
                assert expected[name] == pytest.approx(value, abs=2.5)


def test_a_title_wider_than_its_table_stays_on_one_line():
    title = "own-val, step 120, 12 of 12 captions and a name that is long for a table of one score"
    lines = console.score_text({"cider": 0.5}, {}, title).splitlines()
    assert lines[0].rstrip() == title and max(map(len, lines[1:])) < len(title)


def test_retrieval_has_a_baseline_beside_every_recall():
    records = [{"captions": ["a", "b"]}, {"captions": ["c"]}] * 20
    baselines = Retrieval(RetrievalOptions(loss="contrast"), None).baselines([], records)
    assert baselines["chance_img_r1"] == pytest.approx(100 / 40)
    scores = {**retrieval_scores([1, 2, 3], [1, 1, 9]), "loss": 1.0}
    lines = console.score_text(scores, baselines, "t").splitlines()
    assert "chance" in lines[2]
    assert all("2.5000" in line for line in lines if "img_r1 " in line)
    assert not any(" - " in line for line in lines if "_r1" in line or "r_mean" in line)
