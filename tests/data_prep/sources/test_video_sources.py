"""MSR-VTT, DiDeMo and MSVD-QA: real videos, made here, with the frames and texts that must come out."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from mmpeft_ds.data import video_files as videos
from mmpeft_ds.errors import BadInput
from tests.helpers.data.films import film
from tests.helpers.data.miniatures import prepared, put, records


def shades(frames):
    return [np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean() for _, data in frames.pictures]


def test_frames_stand_in_the_middle_of_equal_parts_of_a_video(tmp_path):
    frames = videos.sample(film(tmp_path / "a.mp4"), 4, 90)
    assert frames.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.1) and not frames.cut
    assert shades(frames) == pytest.approx([50, 70, 90, 110], abs=6)
    assert len(videos.sample(tmp_path / "a.mp4", 100, 90).pictures) == 100, "more frames than the video has"


def test_a_video_that_breaks_off_gives_what_decodes_and_says_so(tmp_path):
    path = film(tmp_path / "a.avi", noise=True)  # so that the frames are most of the file
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames = videos.sample(path, 8, 90)
    assert frames.cut and 1 <= len(frames.pictures) < 8


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_times_count_from_the_first_frame_wherever_the_clock_of_a_camera_stands(tmp_path, ending):
    frames = videos.sample(film(tmp_path / f"a{ending}", start=100), 4, 90)
    assert frames.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.1) and not frames.cut
    assert shades(frames) == pytest.approx([50, 70, 90, 110], abs=6)


def test_a_stream_without_a_length_in_its_header_is_spread_all_the_same(tmp_path):
    frames = videos.sample(film(tmp_path / "a.m4v"), 4, 90)
    assert frames.times == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.1) and len(set(shades(frames))) == 4


def test_of_a_variable_rate_the_frame_that_is_shown_in_the_middle_of_a_part_counts(tmp_path):
    # Frames at 0, 0.1, 1.0 and 2.0 s, the last for 0.1 s: the middles are 0.175, 0.525, 0.875, 1.225, 1.575, 1.925.
    frames = videos.sample(film(tmp_path / "a.mp4", shown=(0, 1, 10, 20)), 6, 90)
    assert frames.times == pytest.approx([0.1, 0.1, 0.1, 1.0, 1.0, 1.0]) and not frames.cut


def test_of_a_video_whose_rest_does_not_decode_the_first_part_is_kept(tmp_path):
    path = film(tmp_path / "a.mp4", noise=True)
    data = path.read_bytes()
    middle, end = (data.index(b"mdat") + data.index(b"moov")) // 2, data.index(b"moov") - 4
    path.write_bytes(data[:middle] + bytes(end - middle) + data[end:])
    frames = videos.sample(path, 8, 90)
    assert frames.cut and 1 <= len(frames.pictures) < 8 and frames.times[-1] < 2.5


def test_files_without_a_frame_are_set_aside(tmp_path):
    root = tmp_path / "msrvtt"
    film(root / "video1.mp4", seconds=1)
    put(root / "video2.mp4", b"")
    film(root / "whole.avi", seconds=1)
    data = (root / "whole.avi").read_bytes()
    put(root / "video3.avi", data[: data.index(b"movi") + 4])  # a header alone
    with av.open(str(root / "video4.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        for packet in (*stream.encode(sound), *stream.encode()):
            container.mux(packet)
    put(root / "train.jsonl", "\n".join(json.dumps({"caption": "a", "clip_name": f"video{n}"}) for n in range(1, 6)))
    manifest = prepared("msrvtt", root, tmp_path / "out", "--form", "aurora", "--frames", "1")
    assert manifest.account["train"]["aside"] == {
        "video cannot be decoded": [3, ["video2", "video3", "video4"]],
        "video missing": [1, ["video5"]],
    }


@pytest.fixture
def msrvtt(tmp_path):
    root = tmp_path / "msrvtt"
    for number in (1, 6600, 7020, 9000):
        film(root / f"videos/all/video{number}.mp4", seconds=1)
    sentences = [{"video_id": f"video{n}", "caption": f"c{n} {k}"} for k in range(2) for n in (1, 6600, 7020, 9000)]
    put(root / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    put(root / "MSRVTT_JSFUSION_test.csv", 'key,vid_key,video_id,sentence\nret0,msr9000,video9000,"a, b"\n')
    return root


def texts(manifest, split):
    return {row["video_id"]: row["captions"] for row in records(manifest, split)}


def test_1k_a_takes_the_sentence_of_its_list_and_9k_trains_on_all_others(msrvtt, tmp_path):
    manifest = prepared("msrvtt", msrvtt, tmp_path / "out", "--frames", "2")
    assert texts(manifest, "test") == {"video9000": ["a, b"]}
    assert list(texts(manifest, "train")) == ["video1", "video6600", "video7020"]
    assert texts(manifest, "train")["video1"] == ["c1 0", "c1 1"]
    row = records(manifest, "test")[0]
    assert row["endings"] == ["0.jpg", "1.jpg"] and len(row["frame_times"]) == 2
    put(msrvtt / "MSRVTT_train.7k.csv", "video_id\r\nvideo6600\r\nvideo17")
    manifest = prepared("msrvtt", msrvtt, tmp_path / "7k", "--form", "7k", "--frames", "1")
    assert list(texts(manifest, "train")) == ["video6600"]
    account = manifest.account["train"]
    assert account["uncaptioned"] == [1, ["video17"]], "listed, and has no caption"
    assert account["aside"] == {"video in no split of this form": [4, ["video1", "video7020"]]}
    put(msrvtt / "MSRVTT_train.7k.csv", "video_id\nvideo6600\n6600\n")
    manifest = prepared("msrvtt", msrvtt, tmp_path / "twice", "--form", "7k", "--frames", "1")
    assert manifest.account["train"]["aside"]["listed before"] == [1, ["video6600"]]
    put(msrvtt / "MSRVTT_train.7k.csv", "video6600\n")
    with pytest.raises(BadInput, match=r"MSRVTT_train.7k.csv: its first line names no column 'video_id'"):
        prepared("msrvtt", msrvtt, tmp_path / "headless", "--form", "7k")


def test_a_sentence_of_1k_a_may_span_lines_and_a_video_that_stands_twice_has_the_first(msrvtt, tmp_path):
    rows = ['r0,m,video9000,"a ""b""\nc"', "r1,m,video9000,again", "r2,m"]
    put(msrvtt / "MSRVTT_JSFUSION_test.csv", "\n".join(["\ufeffkey,vid_key,video_id,sentence", *rows]))
    manifest = prepared("msrvtt", msrvtt, tmp_path / "out", "--splits", "test", "--frames", "1")
    assert texts(manifest, "test") == {"video9000": ['a "b"\nc']}
    aside = {"id given before": [1, ["video9000"]], "record of another form": [1, ["record 2"]]}
    assert manifest.account["test"]["aside"] == aside


def test_each_half_of_the_captions_serves_its_splits(msrvtt, tmp_path):
    whole = json.loads((msrvtt / "MSRVTT_data.json").read_text())
    (msrvtt / "MSRVTT_data.json").unlink()
    put(msrvtt / "train_val_videodatainfo.json", {"sentences": [None, {"caption": "x"}, *whole["sentences"]]})
    manifest = prepared("msrvtt", msrvtt, tmp_path / "full", "--form", "full", "--frames", "1")
    assert list(manifest.splits) == ["train", "val"] and list(texts(manifest, "val")) == ["video6600"]
    manifest = prepared("msrvtt", msrvtt, tmp_path / "7k", "--form", "7k", "--frames", "1")
    assert list(texts(manifest, "train")) == ["video1", "video6600"]
    with pytest.raises(BadInput, match=r" test_videodatainfo.json not there"):
        prepared("msrvtt", msrvtt, tmp_path / "9k", "--form", "9k", "--splits", "train")


def test_the_full_split_goes_by_number_and_a_sentence_without_video_is_set_aside(msrvtt, tmp_path):
    sentences = [*json.loads((msrvtt / "MSRVTT_data.json").read_text())["sentences"], {"caption": "of no video"}]
    more = [(1, 5, "first"), ("1", 5, "again"), ("video1", 6, " ")]  # numbers of videos as well as names
    sentences += [{"video_id": v, "sen_id": s, "caption": c} for v, s, c in more]
    put(msrvtt / "MSRVTT_data.json", {"sentences": sentences})
    manifest = prepared("msrvtt", msrvtt, tmp_path / "out", "--form", "full", "--frames", "1")
    found = {split: list(texts(manifest, split)) for split in manifest.splits}
    assert found == {"train": ["video1"], "val": ["video6600"], "test": ["video7020", "video9000"]}
    assert texts(manifest, "train") == {"video1": ["c1 0", "c1 1", "first"]}
    assert manifest.account["train"]["aside"] == {
        "caption empty": [1, ["6"]],
        "id given before": [1, ["5"]],
        "no 'video_id' in the record": [1, ["record 8"]],
    }
    assert not manifest.account["val"]["aside"] and not manifest.account["test"]["aside"]


def test_questions_of_msrvtt_qa_and_a_video_that_does_not_decode(msrvtt, tmp_path):
    rows = [
        {"answer": "dog", "category_id": 1, "id": k, "question": f"q{k}?", "video_id": n}
        for k, n in enumerate((1, 1, 7020))
    ]
    put(msrvtt / "train_qa.json", [*rows, rows[0] | {"answer": "cat"}])
    put(msrvtt / "videos/all/video7020.mp4", b"no video")
    manifest = prepared("msrvtt", msrvtt, tmp_path / "out", "--form", "qa", "--frames", "1")
    assert [q["question_id"] for q in records(manifest, "train")[0]["questions"]] == [0, 1]
    assert manifest.labels == ["dog"]
    aside = {"id given before": [1, ["0"]], "video cannot be decoded": [1, ["video7020"]]}
    assert manifest.account["train"]["aside"] == aside
    (msrvtt / "train_qa.json").unlink()
    put(msrvtt / "train.jsonl", json.dumps({"answer": "dog", "question": "q", "video_id": "video1"}))
    put(msrvtt / "train_ans2label.json", {"cat": 1, "dog": 0})
    listed = prepared("msrvtt", msrvtt, tmp_path / "clipbert", "--form", "qa", "--frames", "1")
    assert listed.labels == ["dog", "cat"]


def test_a_video_of_didemo_is_one_under_two_endings(tmp_path):
    root = tmp_path / "didemo"
    film(root / "videos/1@N00_2_ab.mp4", seconds=1)
    film(root / "videos/3@N00_4_cd.mov", seconds=1)
    (root / "videos/3@N00_4_cd.mov").rename(root / "videos/3@N00_4_cd.")
    rows = [("1@N00_2_ab.mov", " first\n"), ("3@N00_4_cd.", "alone"), ("1@N00_2_ab.avi", "second ")]
    rows += [("1@N00_2_ab.avi", " \n")]
    rows = [{"annotation_id": i, "video": v, "description": d, "times": [[0, 0]]} for i, (v, d) in enumerate(rows)]
    put(root / "val_data.json", rows)
    manifest = prepared("didemo", root, tmp_path / "out", "--frames", "1")
    assert texts(manifest, "val") == {"1@N00_2_ab": ["first second"], "3@N00_4_cd": ["alone"]}
    assert manifest.account["val"]["aside"] == {"caption empty": [1, ["3"]]}
    apart = prepared("didemo", root, tmp_path / "apart", "--frames", "1", "--form", "sentences")
    assert texts(apart, "val")["1@N00_2_ab"] == ["first", "second"]


def test_clips_of_msvd_are_found_by_the_mapping(tmp_path):
    root = tmp_path / "msvd"
    film(root / "YouTubeClips/-_x 1_0_2.avi", seconds=1)
    put(root / "youtube_mapping.txt", "-_x 1_0_2\tvid7\nother vid8\n-_x 1_0_2\tvid7\ncut")
    rows = [{"answer": "man", "id": i, "question": "who?", "video_id": n} for i, n in enumerate(("7", 8, "vid9"))]
    put(root / "test_qa.json", rows)
    manifest = prepared("msvd-qa", root, tmp_path / "out", "--frames", "1")
    assert records(manifest, "test")[0]["questions"] == [{"question": "who?", "answers": ["man"], "question_id": 0}]
    assert manifest.account["test"]["aside"] == {
        "record of another form": [1, ["line of youtube_mapping.txt 3"]],
        "video missing": [1, ["other"]],
        "video named before": [1, ["vid7"]],
        "video that youtube_mapping.txt does not name": [1, ["vid9"]],
    }


def test_frames_must_be_a_number_that_makes_sense(msrvtt, tmp_path):
    with pytest.raises(BadInput, match="--frames: 0"):
        prepared("msrvtt", msrvtt, tmp_path / "out", "--frames", "0")


def test_videos_may_lie_behind_a_link(msrvtt, tmp_path):
    (msrvtt / "videos").rename(tmp_path / "disk")
    (msrvtt / "videos").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(msrvtt)  # which leads round
    assert prepared("msrvtt", msrvtt, tmp_path / "out", "--frames", "1").samples("train") == 3


def test_rows_of_aurora(msrvtt, tmp_path):
    put(msrvtt / "train.jsonl", json.dumps({"caption": "a man", "clip_name": "all/video1.mp4"}) + "\n")
    manifest = prepared("msrvtt", msrvtt, tmp_path / "out", "--form", "aurora", "--frames", "1")
    assert texts(manifest, "train") == {"video1": ["a man"]}
