"""launchers/score.py: any predictions file against annotations, a prepared data set, or its own references."""

import json

import pytest

from mmpeft_ds.errors import BadInput
from mmpeft_ds.metrics import coco_java
from mmpeft_ds.metrics.captions import caption_scores
from mmpeft_ds.runs import score
from tests.helpers import ROOT, commands

SAID = {1: "a dog runs in the park", 2: "two cats sleep on a bed"}
THEIRS = {1: ["a dog runs in a park", "the dog plays"], 2: ["two cats on a bed", "cats asleep"]}


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path):
    results = write(tmp_path / "results.json", [{"image_id": i, "caption": c} for i, c in SAID.items()])
    rows = [{"image_id": i, "caption": c} for turn in (0, 1) for i in (2, 1) for c in [THEIRS[i][turn]]]
    return results, write(tmp_path / "coco.json", {"images": [], "annotations": rows})


def test_a_coco_result_file_is_scored_against_annotations_in_any_order(files):
    results, annotations = files
    pairs = score.pairs("captions", results, score.Source(annotations))
    wanted = caption_scores(list(SAID.values()), list(THEIRS.values()))
    assert score.scores("captions", pairs) == pytest.approx(wanted, rel=1e-12)


def test_pairs_stand_in_the_order_of_the_images_which_decides_on_a_period_at_the_end(tmp_path):
    said = write(tmp_path / "results.json", [{"image_id": i, "caption": c} for i, c in ((1, "A dog"), (2, "plan b."))])
    rows = [{"image_id": i, "caption": "plan b"} for i in (1, 2)]
    files = {
        order: write(tmp_path / f"{order}.json", {"images": [{"id": i} for i in order], "annotations": rows})
        for order in ((1, 2), (2, 1))
    }
    pairs = {order: score.pairs("captions", said, score.Source(file)) for order, file in files.items()}
    assert [text for text, _ in pairs[2, 1]] == ["plan b.", "A dog"] == [text for text, _ in pairs[1, 2]][::-1]
    bleu = {order: score.scores("captions", pairs[order])["bleu1"] for order in pairs}
    assert bleu[2, 1] > bleu[1, 2], "b ends a sentence before A"


def test_lines_of_json_may_hold_line_breaks_of_unicode_and_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.jsonl"
    row = {"sample_id": 1, "prediction": "a\u2028dog\x85runs", "references": ["a dog runs"]}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert score.pairs("captions", path, score.Source()) == [(row["prediction"], row["references"])]


@pytest.mark.parametrize("wrong", [None, {"text": "a dog"}, ["a", None]])
def test_a_reference_that_is_no_text_is_refused_in_one_line(files, tmp_path, wrong):
    rows = [{"image_id": i, "caption": wrong} for i in SAID]
    with pytest.raises(BadInput, match=r"coco\.json: a reference is no text"):
        score.pairs("captions", files[0], score.Source(write(tmp_path / "coco.json", rows)))


def test_predictions_of_evaluate_hold_their_references(tmp_path):
    rows = [{"sample_id": i, "prediction": SAID[i], "references": THEIRS[i]} for i in SAID]
    path = tmp_path / "predictions-test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score.pairs("captions", path, score.Source()) == [(SAID[i], THEIRS[i]) for i in SAID]


def test_rows_of_one_picture_are_one_item_with_the_captions_of_all(tmp_path):
    lines = ["a red bus", "the bus is red", "a dog"]
    rows = [
        {"sample_id": f"set/{n}", "prediction": line, "references": [line], "picture": "ab"[n // 2]}
        for n, line in enumerate(lines)
    ]
    path = tmp_path / "predictions-test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score.pairs("captions", path, score.Source()) == [("a red bus", lines[:2]), ("a dog", lines[2:])]


@pytest.mark.parametrize(("measure", "accuracy"), [("official", 0.5), ("2017", 1.0), ("exact", 0.5)])
def test_answers_are_scored_by_the_chosen_evaluator(tmp_path, measure, accuracy):
    """Where all annotators agree, the evaluator of 2021 normalises nothing: "The Dog" is not "dog" to it."""
    said = write(
        tmp_path / "said.json", [{"question_id": 1, "answer": "The Dog"}, {"question_id": 2, "answer": "yes"}]
    )
    answers = [{"question_id": i, "answers": [{"answer": a}] * 10} for i, a in ((2, "yes"), (1, "dog"))]
    source = score.Source(write(tmp_path / "annotations.json", {"annotations": answers}))
    assert score.scores("vqa", score.pairs("vqa", said, source), measure) == {"accuracy": pytest.approx(accuracy)}


def test_gqas_questions_are_references_by_their_ids(tmp_path):
    said = write(tmp_path / "said.json", [{"questionId": "02", "prediction": "yes"}])
    file = write(tmp_path / "questions.json", {"02": {"question": "?", "answer": "yes", "imageId": "7"}})
    assert score.pairs("vqa", said, score.Source(file)) == [("yes", ["yes"])]


def test_answers_of_few_annotators_are_also_rated_by_whether_one_of_them_agrees(tmp_path):
    said = write(tmp_path / "said.json", [{"question_id": 1, "answer": "red"}])
    files = {n: write(tmp_path / f"{n}.json", [{"question_id": 1, "answers": ["red"] * n}]) for n in (2, 10)}
    scores = {n: score.scores("vqa", score.pairs("vqa", said, score.Source(file))) for n, file in files.items()}
    assert scores[2] == {"accuracy": pytest.approx(1 / 3), "accuracy_any": 1} and scores[10] == {"accuracy": 1}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"image_id": 1, "caption": "a"}], "1 of 2 missing, first 2"),
        ([{"image_id": i, "caption": "a"} for i in (1, 2, 7)], "1 that .* does not have, first 7"),
        ([{"image_id": i, "caption": "a"} for i in (1, 2, 2)], "1 ids stand twice, first 2"),
        ([{"image": 1, "caption": "a"}], "none of image_id, sample_id"),
        ([{"image_id": 1, "caption": None}], "a prediction is no text"),
        ([], "holds no prediction"),
        (["a"], "is no list of objects"),
    ],
)
def test_ids_that_do_not_match_are_told_in_one_line(files, tmp_path, rows, words):
    with pytest.raises(BadInput, match=words):
        score.pairs("captions", write(tmp_path / "bad.json", rows), score.Source(files[1]))


def test_the_command_prints_a_table_and_notes_once_what_java_would_add(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coco_java.shutil, "which", lambda name: None)
    out = tmp_path / "scores.json"
    given = ("--predictions", str(files[0]), "--references", str(files[1]), "--measure", "captions")
    assert commands.run_script(ROOT / "launchers/score.py", [*given, "--json", str(out)], monkeypatch) in (0, None)
    printed = capsys.readouterr()
    assert "cider" in printed.out and printed.err.count("\n") == 1 and "meteor and spice need" in printed.err
    assert json.loads(out.read_text()) == pytest.approx(caption_scores(list(SAID.values()), list(THEIRS.values())))


def test_the_scores_of_answers_name_the_evaluator(tmp_path, monkeypatch, capsys):
    said = write(tmp_path / "said.json", [{"question_id": 1, "answer": "The Dog", "answers": ["dog"] * 10}])
    given = ("--predictions", str(said), "--measure", "vqa", "--vqa-measure", "2017", "--json", str(tmp_path / "out"))
    assert commands.run_script(ROOT / "launchers/score.py", given, monkeypatch) in (0, None)
    assert "1 questions, evaluator 2017" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out").read_text()) == {"accuracy": 1.0, "vqa_measure": "2017"}


def test_metrics_asked_for_by_name_are_refused_without_what_they_need(files, monkeypatch, capsys):
    monkeypatch.setattr(coco_java.importlib.util, "find_spec", lambda name: None)
    given = ("--predictions", str(files[0]), "--references", str(files[1]), "--measure", "captions")
    code = commands.run_script(ROOT / "launchers/score.py", [*given, "--metrics", "meteor"], monkeypatch)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "mmpeft_ds[eval]" in err


def test_nlvr2_is_scored_by_accuracy_and_by_sentences_that_are_right_for_all_their_pairs(tmp_path):
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "True", "dev-2-0-0": "False"}
    lines = [json.dumps({"identifier": name, "label": label}) for name, label in labels.items()]
    (tmp_path / "dev.json").write_text("\n".join(lines) + "\n")
    said = tmp_path / "submission-dev-nlvr2.csv"
    source = score.Source(tmp_path / "dev.json")
    said.write_text("dev-2-0-0,false\ndev-1-0-0,True\ndev-1-1-0,True\ndev-1-0-1,TRUE\n")
    named = score.named_pairs("nlvr2", said, source)
    assert score.nlvr2_scores(named) == {"accuracy": 3 / 4, "consistency": pytest.approx(2 / 3)}
    said.write_text("dev-2-0-0,false,x\n")
    with pytest.raises(BadInput, match=r"identifier,True ending in \.csv"):
        score.named_pairs("nlvr2", said, source)
    with pytest.raises(BadInput, match="no identifier of NLVR2"):
        score.nlvr2_scores([("7", ("true", ["true"]))])
