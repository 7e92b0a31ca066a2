"""VQAv2 from the official files and the forms of LXMERT, VL-T5 and BLIP; expected values by the published rules."""

import json

import pytest

from mmpeft_ds.errors import BadInput
from tests.helpers.data.miniatures import prepared, put, put_picture, records

FOLDERS = {1: "train2014", 2: "train2014", 3: "val2014", 4: "val2014", 5: "test2015"}


def path(number):
    return f"{FOLDERS[number]}/COCO_{FOLDERS[number]}_{number:012d}.jpg"


def annotation(question, answers, main, kind="other"):
    given = [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(answers)]
    head = {"question_id": question, "image_id": question // 1000, "question_type": "what is", "answer_type": kind}
    return head | {"multiple_choice_answer": main, "answers": given}


ANSWERS = {  # question -> (ten answers, main answer)
    1001: (["two"] * 9 + ["2"], "two"),
    1002: (["A red bus."] * 3 + ["red bus"] * 4 + ["bus"] * 3, "red bus"),
    2001: (["yes"] * 10, "yes"),
    3001: (["2"] * 4 + ["yes"] * 6, "yes"),
    4001: (["no"] * 10, "no"),
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "vqa"
    for number in FOLDERS:
        put_picture(root / path(number), number)
    asked = {
        "train2014": (1002, 1001, 2001),
        "val2014": (3001, 4001),
        "test2015": (5001, 5002),
        "test-dev2015": (5001,),
    }
    for subtype, ids in asked.items():
        rows = [{"image_id": q // 1000, "question": f"what is {q}?", "question_id": q} for q in ids]
        put(root / f"v2_OpenEnded_mscoco_{subtype}_questions.json", {"info": {}, "questions": rows})
        if subtype.startswith(("train", "val")):
            rows = [annotation(q, *ANSWERS[q]) for q in sorted(ids, reverse=True)]
            put(root / f"v2_mscoco_{subtype}_annotations.json", {"annotations": rows})
    return root


def test_official_files_are_joined_by_id_and_grouped_by_picture(root, tmp_path):
    manifest = prepared("vqav2", root, tmp_path / "out", "--min-answer-count", "1")
    assert {s: manifest.samples(s) for s in manifest.splits} == {"train": 2, "val": 2, "test": 1, "test_dev": 1}
    first = records(manifest, "train")[0]
    assert first["image_id"] == 1 and [q["question_id"] for q in first["questions"]] == [1002, 1001]
    assert first["questions"][1]["answers"] == ANSWERS[1001][0] and first["questions"][1]["type"] == "other"
    assert records(manifest, "test")[0]["questions"] == [
        {"question": f"what is {q}?", "answers": [], "question_id": q} for q in (5001, 5002)
    ]
    assert records(manifest, "test_dev")[0]["source_name"] == path(5)


def test_the_list_counts_normalised_main_answers_of_train_and_val_and_targets_count_them_as_written(root, tmp_path):
    manifest = prepared("vqav2", root, tmp_path / "out", "--min-answer-count", "1")
    assert manifest.labels == ["yes", "2", "no", "red bus"]
    first = records(manifest, "train")[0]["questions"]
    assert first[1]["scores"] == {"2": 0.3}  # "two" x 9 gives the class "2" nothing, as published
    assert first[0]["scores"] == {"red bus": 1.0}
    fixed = prepared("vqav2", root, tmp_path / "fixed", "--min-answer-count", "1", "--targets", "normalised")
    first = records(fixed, "train")[0]["questions"]
    assert first[1]["scores"] == {"2": 1.0} and first[0]["scores"] == {"red bus": 1.0}
    assert prepared("vqav2", root, tmp_path / "most", "--min-answer-count", "2").labels == ["yes"]


def test_an_annotation_that_stands_twice_counts_once_in_the_list_and_the_last_is_joined(root, tmp_path):
    rows = [annotation(q, *ANSWERS[q]) for q in (1001, 1002, 2001)] + [annotation(2001, ["no"] * 2, "yes")]
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": [*rows, None, {"question_id": 7}]})
    manifest = prepared("vqav2", root, tmp_path / "out", "--min-answer-count", "2")
    assert manifest.labels == ["yes"], "of 2001 and 3001, not of the row that repeats"
    account = manifest.account["train"]
    assert account["records"] == 6 and account["aside"] == {
        "annotation given before": [1, ["2001"]],
        "annotation without a question": [1, ["7"]],
        "record of another form": [1, ["annotation 4"]],
    }
    assert records(manifest, "train")[1]["questions"][0]["answers"] == ["no"] * 2
    assert prepared("vqav2", root, tmp_path / "three", "--min-answer-count", "3").labels is None


def test_soft_targets_of_lists_of_any_length_count_the_votes(root, tmp_path):
    lists = {1002: (["yes"], "yes"), 1001: (["yes", "no", "no"], "no"), 2001: (["no"] * 5 + ["yes"] * 6, "yes")}
    rows = [annotation(q, *given) for q, given in lists.items()]
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": rows})
    manifest = prepared("vqav2", root, tmp_path / "out", "--min-answer-count", "1")
    asked = [q for row in records(manifest, "train") for q in row["questions"]]
    assert [q["scores"] for q in asked] == [{"yes": 1.0}, {"yes": 0.3, "no": 0.6}, {"no": 1.0, "yes": 1.0}]


def test_questions_of_few_annotators_are_told_also_among_others(root, tmp_path, capsys):
    prepared("vqav2", root, tmp_path / "ten")
    assert "The official VQA measure is made for ten" not in capsys.readouterr().out
    rows = [annotation(q, *ANSWERS[q]) for q in (1001, 1002)] + [annotation(2001, ["yes"] * 2, "yes")]
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": rows})
    prepared("vqav2", root, tmp_path / "few")
    assert "train: questions have 2 to 10 answers. The official VQA measure is made for ten" in capsys.readouterr().out


def test_karpathys_split_goes_by_picture_and_restval_trains(root, tmp_path):
    split_of = {1: "train", 2: "test", 3: "restval", 4: "val"}
    images = [{"cocoid": n, "filepath": FOLDERS[n], "filename": path(n), "split": s} for n, s in split_of.items()]
    put(root / "dataset_coco.json", {"images": [*images, {"split": "train"}]})
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "karpathy", "--min-answer-count", "1")
    found = {s: [r["image_id"] for r in records(manifest, s)] for s in manifest.splits}
    assert found == {"train": [1, 3], "val": [4], "test": [2]}
    assert records(manifest, "test")[0]["questions"][0]["answers"] == ["yes"] * 10
    assert manifest.account["train"]["aside"] == {"no 'cocoid' in the record": [1, ["image 4"]]}


@pytest.mark.parametrize("splits", [("train", "val"), ("val", "train"), ("test",)])
def test_annotations_of_no_question_are_told_once_by_the_first_split_of_a_file(root, tmp_path, splits):
    rows = [annotation(q, *ANSWERS[q]) for q in (1001, 1002, 2001)] + [annotation(9009, ["x"] * 10, "x")]
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": rows})
    split_of = {1: "train", 2: "test", 3: "restval", 4: "val"}
    images = [{"cocoid": n, "filepath": FOLDERS[n], "filename": path(n), "split": s} for n, s in split_of.items()]
    put(root / "dataset_coco.json", {"images": [*images, images[0]]})
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "karpathy", "--splits", *splits)
    aside = {"annotation without a question": [1, ["9009"]], "listed before": [1, ["1"]]}
    told = {split: manifest.account[split]["aside"] for split in splits}
    assert told == {split: aside if split == splits[0] else {} for split in splits}
    if splits == ("test",):
        return
    manifest = prepared("vqav2", root, tmp_path / "official", "--splits", *splits)
    del aside["listed before"]
    told = {split: manifest.account[split]["aside"] for split in splits}
    assert told == {"train": aside, "val": {}}, "questions of val have their own file"


def test_questions_of_pictures_without_a_split_are_told_once(root, tmp_path):
    split_of = {1: "train", 2: "testt", 4: "val"}
    images = [{"cocoid": n, "filepath": FOLDERS[n], "filename": path(n), "split": s} for n, s in split_of.items()]
    put(root / "annotations/dataset_coco.json", {"images": images})
    file = root / "v2_OpenEnded_mscoco_train2014_questions.json"
    put(file, {"questions": [{"question_id": 7}, None, *json.loads(file.read_text())["questions"]]})
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "karpathy")
    aside = {"picture in no split of Karpathy's file": [2, ["2001", "3001"]]}
    aside |= {"no 'image_id' in the record": [1, ["record 0"]], "record of another form": [1, ["record 1"]]}
    assert {split: manifest.account[split]["aside"] for split in manifest.splits} == {"train": aside, "val": {}}


def test_rows_of_lxmert_bring_their_targets_and_take_the_annotators_from_the_official_files(root, tmp_path):
    row = {"img_id": "COCO_train2014_000000000001", "sent": "what?", "answer_type": "number", "question_type": "how"}
    rows = [
        row | {"question_id": 1001, "label": {"2": 0.9, "two": 0.3}},
        row | {"question_id": 77, "label": {"x": 0.6}},
    ]
    put(root / "train.json", rows)
    put(root / "trainval_label2ans.json", ["x", "2", ""])
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "lxmert")
    asked = records(manifest, "train")[0]["questions"]
    assert manifest.labels == ["x", "2", ""]
    assert asked[0]["scores"] == {"2": 0.9, "two": 0.3} and asked[0]["answers"] == ANSWERS[1001][0]
    assert asked[1]["scores"] == {"x": 0.6} and asked[1]["answers"] == []
    (root / "trainval_label2ans.json").unlink()
    put(root / "trainval_ans2label.json", {"2": 1, "x": 0, "": 2})
    put(root / "valid.json", [rows[0]])
    manifest = prepared("vqav2", root, tmp_path / "again", "--form", "lxmert")
    assert manifest.labels == ["x", "2", ""] and list(manifest.splits) == ["train", "valid"]


def test_rows_of_blip(root, tmp_path):
    rows = [{"question_id": 1, "question": "q?", "answer": ["a"] * 10, "image": path(3), "dataset": "vqa"}]
    put(root / "vqa_val.json", rows)
    put(root / "answer_list.json", ["b", "a"])
    rows += [{**rows[0], "question_id": 2, "image": None}, {**rows[0], "question_id": "\ud800"}]
    rows += [{key: value for key, value in rows[0].items() if key != "answer"} | {"question_id": 3}]
    rows += [{**rows[0], "question_id": 4, "answer": []}]
    put(root / "vqa_val.json", rows)
    put(root / "vqa_test.json", [{"question_id": 9, "question": "q?", "image": path(5), "dataset": "vqa"}])
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "blip")
    assert manifest.labels == ["b", "a"] and records(manifest, "val")[0]["questions"][0]["answers"] == ["a"] * 10
    assert records(manifest, "test")[0]["questions"][0]["answers"] == []
    aside = {"no 'answer' in the record": [1, ["record 3"]], "record of another form": [2, ["record 1", "record 2"]]}
    aside |= {"question without an answer": [1, ["vqa 4"]]}
    assert manifest.account["val"]["aside"] == aside


def test_questions_of_visual_genome_weigh_a_fifth_in_blips_files(root, tmp_path):
    row = {"question_id": 1, "question": "q?", "answer": ["a"] * 10, "image": path(1), "dataset": "vqa"}
    genome = row | {"answer": "a man", "image": "VG_100K/7.jpg", "dataset": "vg"}  # ids are counted by each set
    put(root / "vqa_train.json", [row, genome])
    put_picture(root / "VG_100K/7.jpg", 7)

    def weights(out, *options):
        manifest = prepared("vqav2", root, tmp_path / out, "--form", "blip", *options)
        return [question.get("weight") for found in records(manifest, "train") for question in found["questions"]]

    assert weights("blip") == [None, 0.2] and weights("lavis", "--vg-weight", "1") == [None, 1.0]
    with pytest.raises(BadInput, match="--vg-weight: -1.0. Use 0 or more"):
        weights("negative", "--vg-weight", "-1")


def test_broken_records_are_counted_and_named(root, tmp_path):
    rows = [
        {"image_id": 1, "question": "a?", "question_id": 1001},
        {"image_id": 1, "question": "again?", "question_id": 1001},
        {"image_id": 1, "question": "never annotated?", "question_id": 1009},
        {"image_id": 9, "question": "no picture?", "question_id": 9001},
        {"image_id": 1, "question": "of another picture?", "question_id": 2001},
        {"image_id": "1", "question": "an id of text?", "question_id": "1004"},
        {"image_id": True, "question": "no id?", "question_id": 1005},
        {"image_id": 1, "question": "no id?", "question_id": 1.5},
        {"image_id": 1, "question": "nobody answered?", "question_id": 1006},
        {"image_id": 1, "question": "half a character \ud800", "question_id": 1002},
        {"image_id": 1, "question_id": 1003},
    ]
    put(root / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": rows})
    noted = [annotation(q, *ANSWERS[1001]) for q in (1001, 1002, 1004, 1005, 2001, 9001)] + [annotation(1006, [], "")]
    put(root / "v2_mscoco_train2014_annotations.json", {"annotations": noted})
    manifest = prepared("vqav2", root, tmp_path / "out", "--splits", "train")
    assert [q["question_id"] for q in records(manifest, "train")[0]["questions"]] == [1001, "1004"]
    account = manifest.account["train"]
    missing = "train2014/COCO_train2014_000000000009.jpg"
    assert account["records"] == 11 and account["aside"] == {
        "annotation of another picture": [1, ["2001"]],
        "id given before": [1, ["1001"]],
        "no 'question' in the record": [1, ["record 10"]],
        "picture missing": [1, [missing]],
        "question without an answer": [1, ["1006"]],
        "question without annotation": [1, ["1009"]],
        "record of another form": [3, ["record 6", "record 7", "record 9"]],
    }


def test_what_vlt5_tests_on_has_answers(root, tmp_path):
    row = {"img_id": "COCO_val2014_000000000003", "sent": "what?", "question_id": 3001, "is_topk_optimal": True}
    rows = [row | {"label": {"yes": 1}}, row | {"question_id": 3002, "label": {"no": 1.5}}]
    put(root / "karpathy_test.json", rows)
    manifest = prepared("vqav2", root, tmp_path / "out", "--form", "vlt5")
    asked = records(manifest, "test")[0]["questions"]
    assert len(asked) == 1 and asked[0]["scores"] == {"yes": 1.0} and asked[0]["answers"] == ANSWERS[3001][0]
    assert manifest.account["test"]["aside"] == {"score that is not from 0 to 1": [1, ["3002"]]}


def test_pictures_that_are_still_packed_are_told(root, tmp_path, capsys):
    (root / "train2014").rename(tmp_path / "elsewhere")
    put(root / "train2014.zip", b"PK")
    with pytest.raises(BadInput, match=r"picture missing .* Unpack train2014.zip there. VQAv2 comes from"):
        prepared("vqav2", root, tmp_path / "out", "--splits", "train")
    prepared("vqav2", root, tmp_path / "out", "--splits", "train", "val")
    assert f"files are missing below {root}. Unpack train2014.zip there." in capsys.readouterr().err


def test_a_list_made_of_train_alone_is_said_and_a_list_that_names_an_answer_twice_is_refused(root, tmp_path, capsys):
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    prepared("vqav2", root, tmp_path / "out", "--splits", "train")
    assert "made of v2_mscoco_train2014_annotations.json alone" in capsys.readouterr().err
    put(root / "vqa_val.json", [{"question_id": 1, "question": "q?", "answer": ["a"], "image": path(3)}])
    put(root / "answer_list.json", ["a", "a"])
    with pytest.raises(BadInput, match="'a' stands twice"):
        prepared("vqav2", root, tmp_path / "twice", "--form", "blip")


@pytest.mark.parametrize("layout", ["Questions", "vqa"])
def test_files_may_lie_where_public_tools_have_them(root, tmp_path, layout):
    for file in list(root.glob("v2_*.json")):
        folder = "Annotations" if layout == "Questions" and "annotations" in file.name else layout
        put(root / folder / file.name, file.read_bytes())
        file.unlink()
    (root / "Images/mscoco").mkdir(parents=True)
    for folder in set(FOLDERS.values()):
        (root / folder).rename(root / "Images/mscoco" / folder)
    manifest = prepared("vqav2", root, tmp_path / "out")
    assert manifest.samples("train") == 2 and not manifest.account["train"]["aside"]
