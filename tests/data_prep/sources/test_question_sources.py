"""OK-VQA, GQA, VizWiz-VQA, Visual Genome, NLVR2 and SNLI-VE from miniatures of their official layouts."""

import json

from tests.helpers.data.miniatures import prepared, put, put_picture, records


def asked(manifest, split):
    return [(q["question"], q["answers"]) for row in records(manifest, split) for q in row["questions"]]


def test_ok_vqa_takes_the_normalised_answers_and_val2014_is_test(tmp_path):
    root = tmp_path / "okvqa"
    for split, subtype, image in (("train", "train2014", 1), ("test", "val2014", 2)):
        put_picture(root / f"Images/mscoco/{subtype}/COCO_{subtype}_{image:012d}.jpg", image)
        rows = [{"image_id": image, "question": f"{split}?", "question_id": 10 * image + 5}]
        put(root / f"OpenEnded_mscoco_{subtype}_questions.json", {"questions": rows})
        answers = [
            {"answer": a, "raw_answer": a + "s", "answer_id": i} for i, a in enumerate(["cat"] * 6 + ["dog"] * 4)
        ]
        head = {"question_id": 10 * image + 5, "image_id": image, "question_type": "one", "answer_type": "other"}
        replaced = head | {"answers": [{"answer": "bird"}] * 10}
        put(root / f"mscoco_{subtype}_annotations.json", {"annotations": [replaced, head | {"answers": answers}]})
    manifest = prepared("okvqa", root, tmp_path / "out")
    assert manifest.labels == ["cat", "dog"]
    assert asked(manifest, "test") == [("test?", ["cat"] * 6 + ["dog"] * 4)]
    assert records(manifest, "train")[0]["questions"][0]["scores"] == {"cat": 1.0, "dog": 1.0}


def test_gqa_keeps_leading_zeros_and_test_has_no_answers(tmp_path):
    root = tmp_path / "gqa"
    train = {
        "02930152": {
            "question": "Is it red?",
            "imageId": "2405722",
            "answer": "no",
            "types": {"structural": "verify"},
        },
        "00000007": {"question": "What?", "imageId": "2405722", "answer": "sky", "types": {"structural": "query"}},
        "3": {"question": "Gone?", "imageId": "9", "answer": "no"},
        "4": {"question": "Unanswered?", "imageId": "2405722"},
        "5": None,
        "6": {"question": "Several?", "imageId": "2405722", "answer": ["no"]},
    }
    train["7"] = {"question": "Odd types?", "imageId": "2405722", "answer": "no", "types": {"structural": 5}}
    train["8"] = {"question": "Nothing?", "imageId": "2405722", "answer": " "}
    content = json.dumps(train)[:-1] + ', "02930152": {"question": "Again?", "imageId": "2405722", "answer": "yes"}}'
    put(root / "questions1.2/train_balanced_questions.json", content)
    put(root / "questions1.2/test_balanced_questions.json", {"201": {"question": "Who?", "imageId": "n161313"}})
    put_picture(root / "images/2405722.jpg", 1)
    put_picture(root / "images/n161313.jpg", 2)
    manifest = prepared("gqa", root, tmp_path / "out")
    row = records(manifest, "train")[0]
    ids = ["02930152", "00000007", "7"]
    assert row["image_id"] == "2405722" and [q["question_id"] for q in row["questions"]] == ids
    assert row["questions"][1]["type"] == "query" and "type" not in row["questions"][2]
    assert manifest.labels == ["no", "sky"], "an answer to a question that stands twice is not listed"
    assert asked(manifest, "test") == [("Who?", [])]
    assert manifest.account["train"]["aside"] == {
        "id given before": [1, ["02930152"]],
        "no 'answer' in the record": [1, ["record 3"]],
        "picture missing": [1, ["images/9.jpg"]],
        "question without an answer": [1, ["8"]],
        "record of another form": [2, ["record 4", "record 5"]],
    }


def test_gqas_whole_sets_merge_the_files_of_train_and_have_the_submission(tmp_path):
    root = tmp_path / "gqa"
    put_picture(root / "images/1.jpg", 1)
    for k, answer in enumerate(("yes", "no")):
        row = {"question": f"{k}?", "imageId": "1", "answer": answer, "isBalanced": False}
        put(root / f"questions1.2/train_all_questions/train_all_questions_{k}.json", {f"0{k}": row})
    put(root / "questions1.2/train_all_questions/._train_all_questions_0.json", b"\x00\x05\x16\x07")  # of an archive
    put(root / "questions1.2/submission_all_questions.json", {"02": {"question": "w?", "imageId": "1"}})
    manifest = prepared("gqa", root, tmp_path / "out", "--all")
    assert asked(manifest, "train") == [("0?", ["yes"]), ("1?", ["no"])]
    assert asked(manifest, "submission") == [("w?", [])]


def test_gqa_of_lxmert_finds_pictures_with_visual_genomes(tmp_path):
    root = tmp_path / "gqa"
    put(root / "train.json", [{"img_id": "1", "label": {"yes": 1.0}, "question_id": "05", "sent": "ok?"}])
    put(root / "submit.json", [{"img_id": "n2", "question_id": "6", "sent": "and?"}])
    put_picture(root / "VG/VG_100K/1.jpg", 1)
    put_picture(root / "GQA/images/n2.jpg", 2)
    manifest = prepared("gqa", root, tmp_path / "out", "--form", "lxmert")
    assert asked(manifest, "train") == [("ok?", ["yes"])] and asked(manifest, "submit") == [("and?", [])]
    assert manifest.labels == ["yes"]
    put(root / "trainval_label2ans.json", ["no", "yes"])
    assert prepared("gqa", root, tmp_path / "listed", "--form", "lxmert").labels == ["no", "yes"]


def test_vizwiz_questions_keep_unanswerable_and_an_empty_question(tmp_path):
    root = tmp_path / "vizwiz"
    given = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
    row = {"image": "VizWiz_train_00000000.jpg", "question": "", "answers": given, "answer_type": "unanswerable"}
    nobody = row | {"image": "VizWiz_train_00000001.jpg", "answers": []}
    again = [row | {"answers": [{"answer": "red"}] * 10}] * 2
    put(root / "Annotations/train.json", [row | {"answerable": 0}, nobody, *again])
    put(root / "Annotations/test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What is it?"}])
    put_picture(root / "train/VizWiz_train_00000000.jpg", 1)
    put_picture(root / "test/VizWiz_test_00000000.jpg", 2)
    manifest = prepared("vizwiz-vqa", root, tmp_path / "out")
    found = records(manifest, "train")[0]
    aside = {"question without an answer": [1, ["VizWiz_train_00000001.jpg"]]}
    aside |= {"id given before": [2, ["VizWiz_train_00000000.jpg"]]}
    assert manifest.labels == ["unanswerable"], "answers to a picture that stands again do not count"
    assert manifest.account["train"]["aside"] == aside
    assert found["answerable"] == 0 and asked(manifest, "train") == [("", ["unanswerable"] * 10)]
    assert records(manifest, "test")[0]["questions"][0]["question_id"] == "VizWiz_test_00000000.jpg"


def test_visual_genome_looks_in_both_folders(tmp_path):
    root = tmp_path / "vg"
    region = {"x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a dog"}
    rows = [
        {"id": n, "regions": [region | {"region_id": 10 * n + k, "image_id": n} for k in range(2)]} for n in (1, 2)
    ]
    rows[0]["regions"].insert(1, region | {"region_id": 99, "image_id": 1, "phrase": None})
    rows += [{"id": 3, "regions": []}, {"id": 4, "regions": None}]
    rows[1]["regions"] += [region | {"region_id": 5, "image_id": 2, "x": "1"}]
    rows[1]["regions"] += [region | {"region_id": 6, "image_id": 2, "phrase": " "}]
    qas = [{"qa_id": 5, "image_id": 2, "question": "Who?", "answer": "A man."}]
    qas += [{"qa_id": 6, "question": "Where?", "answer": "Here."}, {"qa_id": None, "question": "?", "answer": "."}]
    put(root / "question_answers.json", [{"id": 2, "qas": qas}])
    put(root / "region_descriptions.json", rows)
    put_picture(root / "VG_100K/1.jpg", 1)
    put_picture(root / "VG_100K_2/2.jpg", 2)
    manifest = prepared("visual-genome", root, tmp_path / "regions")
    assert manifest.account["train"]["aside"] == {
        "box of other things than numbers": [1, ["5"]],
        "caption empty": [1, ["6"]],
        "record of another form": [2, ["record 1", "record 8"]],
    }, "single regions"
    assert manifest.account["train"]["uncaptioned"] == [1, ["3.jpg"]]
    rows = records(manifest, "train")
    assert [row["captions"] for row in rows] == [["a dog", "a dog"]] * 2 and rows[0]["boxes"] == [[1, 2, 3, 4]] * 2
    manifest = prepared("visual-genome", root, tmp_path / "questions", "--form", "questions")
    assert asked(manifest, "train") == [("Who?", ["A man."]), ("Where?", ["Here."])], "a picture's id may stand once"
    assert manifest.account["train"]["aside"] == {"record of another form": [1, ["record 2"]]}


def test_nlvr2_pairs_pictures_by_content_whatever_their_ending(tmp_path):
    root = tmp_path / "nlvr2"
    train = [
        {"identifier": f"train-10-0-{k}", "sentence": f"s{k}", "label": label, "directory": 7}
        for k, label in enumerate(["True", "False", "maybe"])
    ]
    train.append(train[0] | {"identifier": "train-10-0-3", "sentence": " "})
    put(root / "nlvr2/data/train.json", "\n".join(map(json.dumps, train)))
    dev = {"identifier": "dev-850-0-0", "sentence": "s", "label": "True"}
    put(root / "nlvr2/data/dev.json", json.dumps(dev) + "\r\n")
    for k in (0, 1):
        put_picture(root / f"images/train/7/train-10-0-img{k}.png", k)  # a JPEG
        put_picture(root / f"images/dev/dev-850-0-img{k}.png", 5 + k, "PNG")
    manifest = prepared("nlvr2", root, tmp_path / "out")
    row = records(manifest, "train")[0]
    assert row["endings"] == ["0.jpg", "1.jpg"] and asked(manifest, "train") == [("s0", ["true"]), ("s1", ["false"])]
    assert row["questions"][0]["question_id"] == "train-10-0-0"
    assert records(manifest, "dev")[0]["endings"] == ["0.png", "1.png"]
    assert manifest.account["train"]["aside"] == {
        "label neither True nor False": [1, ["train-10-0-2"]],
        "sentence empty": [1, ["train-10-0-3"]],
    }
    put(root / "nlvr2/data/balanced/balanced_dev.json", [dev | {"label": "False"}])  # a list is read as well
    manifest = prepared("nlvr2", root, tmp_path / "balanced", "--subset", "balanced")
    assert asked(manifest, "dev") == [("s", ["false"])] and manifest.account["dev"]["expected"] == {"texts": 2300}


def test_snli_ve_reads_three_spellings_of_the_pictures_key(tmp_path):
    root = tmp_path / "snli"
    rows = [
        {"Flickr30K_ID": "11", "gold_label": "entailment"},
        {"Flikr30kID": "12.JPG", "gold_label": "neutral"},
        {"Flickr30kID": "data/11.jpg", "gold_label": "contradiction"},
        {"Flickr30K_ID": 12, "gold_label": "entailment"},
        {"Flickr30K_ID": "11", "gold_label": "-"},
        {"captionID": "13", "gold_label": "neutral"},
        {"Flickr30K_ID": ["11"], "gold_label": "neutral"},
    ]
    rows = [row | {"pairID": f"p{i}", "sentence2": f"h{i}"} for i, row in enumerate(rows)]
    put(root / "snli_ve_dev.jsonl", "﻿" + "\r\n \r\n".join(map(json.dumps, rows)))
    for number in (11, 12):
        put_picture(root / f"flickr30k-images/{number}.jpg", number)
    manifest = prepared("snli-ve", root, tmp_path / "out")
    assert asked(manifest, "dev") == [
        ("h0", ["entailment"]),
        ("h2", ["contradiction"]),
        ("h1", ["neutral"]),
        ("h3", ["entailment"]),
    ]
    assert {r: n for r, (n, _) in manifest.account["dev"]["aside"].items()} == {
        "no gold label": 1,
        "none of the keys Flickr30K_ID, Flikr30kID, Flickr30kID, image": 1,
        "record of another form": 1,
    }
    albef = {"image": "12", "sentence": "of ALBEF", "label": "neutral"}
    put(root / "snli_ve_test.json", [albef, {"image": "12"}, albef | {"label": "-"}])
    manifest = prepared("snli-ve", root, tmp_path / "albef", "--splits", "test")
    assert asked(manifest, "test") == [("of ALBEF", ["neutral"])]
    aside = {"no 'gold_label' in the record": [1, ["record 1"]], "no gold label": [1, ["12"]]}
    assert manifest.account["test"]["aside"] == aside
    words = prepared("snli-ve", root, tmp_path / "words", "--words", "p-adapter")
    assert words.labels == ["Correct", "Ambiguous", "Incorrect"] and asked(words, "dev")[0] == ("h0", ["Correct"])
