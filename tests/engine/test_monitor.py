"""What a run logs: metrics.jsonl, TensorBoard curves and pictures."""

import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpeft_ds.engine.evaluator import Evaluation
from mmpeft_ds.engine.monitor import PAGE, Monitor, _result, page
from mmpeft_ds.files import CannotWrite, cannot_write
from mmpeft_ds.recipe.options import MonitorOptions


def row(step: int, **changes) -> dict:
    return {
        "step": step,
        "epoch": 0,
        "loss": 0.1 + step / 3,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "grad_norms": {"text_model.encoder.layer.0": 1.0, "head": 1.1},
        "samples_per_second": 10.0,
        "step_seconds": 0.5,
        "data_wait_share": 0.1,
        "skipped_total": 0,
        "slowest_rank": 1,
        "slowest_excess": 0.01,
        "bad": {"image": 2},
        "rss_mib": [500, 510],
        "sample_keys_hash": "00ff",
    } | changes


def board(folder) -> EventAccumulator:
    loaded = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    return loaded.Reload()


def test_metrics_keep_every_bit_and_stay_json_when_the_loss_is_not_finite(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(tensorboard=False), 3, 0, "")
    rows = [row(1), row(2, loss=math.nan), row(3, grad_norm=math.inf)]
    for r in rows:
        monitor.step(r)
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # before close
    monitor.close()
    assert read[0]["loss"] == rows[0]["loss"]
    assert read[1]["loss"] == "nan" and read[2]["grad_norm"] == "inf"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_curve_that_is_removed_or_replaced_while_the_run_writes_it_is_whole_at_its_end(tmp_path, replaced):
    monitor, path = Monitor(tmp_path, MonitorOptions(tensorboard=False), 5, 0, ""), tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        monitor.step(row(step))
        if step in (2, 5):
            path.unlink()
            path.write_text("other\n") if replaced else None
    monitor.flush()()
    monitor.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_save_that_ends_before_it_has_waited_for_the_curve_leaves_no_descriptor_open(tmp_path):
    monitor, open_files = Monitor(tmp_path, MonitorOptions(tensorboard=False), 5, 0, ""), Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    wait = monitor.flush()
    assert len(list(open_files.iterdir())) == before + 1
    del wait
    assert len(list(open_files.iterdir())) == before
    monitor.flush()()
    assert len(list(open_files.iterdir())) == before
    monitor.close()


def test_a_file_system_that_does_not_count_links_does_not_pass_for_a_removed_curve(tmp_path, monkeypatch, capsys):
    monitor, fstat = Monitor(tmp_path, MonitorOptions(tensorboard=False), 5, 0, ""), os.fstat

    def without_links(descriptor: int) -> os.stat_result:
        values = list(fstat(descriptor))
        values[stat.ST_NLINK] = 0
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", without_links)
    monitor.step(row(1))
    assert "written again" not in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()
    monitor.step(row(2))
    assert "written again" in capsys.readouterr().err
    monkeypatch.undo()
    monitor.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_directory_that_is_gone_is_a_file_that_cannot_be_written(tmp_path):
    monitor = Monitor(tmp_path / "run", MonitorOptions(tensorboard=False), 5, 0, "")
    monitor.step(row(1))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CannotWrite) as raised:
        monitor.step(row(2))
    assert "its directory is gone" in cannot_write(raised.value) and not (tmp_path / "run").exists()


def test_a_curve_that_another_machine_removed_is_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    monitor = Monitor(tmp_path, MonitorOptions(tensorboard=False), 5, 0, "")
    with monkeypatch.context() as patched:  # as NFS answers for an open file that is gone

        def stale(descriptor: int) -> os.stat_result:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        patched.setattr(os, "fstat", stale)
        with pytest.raises(CannotWrite, match=r"metrics\.jsonl"):
            monitor.step(row(1))
    monitor.close()


def test_tensorboard_has_the_curves_the_metrics_the_predictions_and_the_recipe(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(), 4, 0, "seed: 7")
    for step in (1, 2):
        monitor.step(row(step))
    picture = (torch.rand(3, 8, 8), [{"text": "is it red ?", "prediction": "yes", "answers": ["no", "yes", "yes"]}])
    monitor.evaluation("toy-val", 2, Evaluation({"accuracy": 0.5}, [{}], [picture]))
    monitor.close()
    found = board(tmp_path)
    tags = found.Tags()
    for tag in (
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/skipped_steps",
        "grad_norm/head",
        "speed/samples_per_second",
        "speed/data_wait_share",
        "speed/slowest_rank",
        "memory_mib/rank_1",
        "bad_samples/image",
        "eval/toy-val/accuracy",
    ):
        assert tag in tags["scalars"], tag
    assert [e.step for e in found.Scalars("train/loss")] == [1, 2]
    assert "predictions/toy-val" in tags["images"]
    assert b"seed: 7" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def removed_file(folder, monitor):
    monitor.board.path.unlink()


def removed_folder(folder, monitor):
    shutil.rmtree(folder)


def replaced_by_a_part(folder, monitor):
    content = monitor.board.path.read_bytes()
    monitor.board.path.unlink()
    monitor.board.path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("remove", [removed_file, removed_folder, replaced_by_a_part])
def test_event_files_that_are_removed_while_a_run_writes_them_are_whole_at_its_end(tmp_path, capsys, remove):
    monitor = Monitor(tmp_path, MonitorOptions(), 9, 0, "seed: 7")
    for step in range(1, 10):
        monitor.step(row(step))
        if step in (3, 4, 7):
            remove(tmp_path / "tensorboard", monitor)
    monitor.evaluation("toy-val", 9, Evaluation({"accuracy": 0.5}, [{}], []))
    monitor.close()
    found = board(tmp_path)
    assert [e.step for e in found.Scalars("train/loss")] == list(range(1, 10))
    assert [e.step for e in found.Scalars("eval/toy-val/accuracy")] == [9]
    assert b"seed: 7" in found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
    assert capsys.readouterr().err.count("was removed or replaced") == 3


def test_a_place_where_no_event_file_can_be_written_again_is_one_that_cannot_be_written(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(), 2, 0, "")
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "tensorboard").write_text("no folder")
    for _ in range(2):
        with pytest.raises(OSError) as refused:
            monitor.step(row(1))
        assert cannot_write(refused.value)
    monitor.close()


def test_what_is_written_a_step_does_not_grow_with_the_number_of_ranks(tmp_path):
    memory = [500.0 + (rank == 300) * 70 for rank in range(512)]
    monitor = Monitor(tmp_path, MonitorOptions(), 100, 0, "")
    for step in (1, 2, 100):
        monitor.step(row(step, rss_mib=memory, peak_rss_mib=memory))
    monitor.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    summary = {"highest": 570.0, "rank_of_highest": 300, "mean": sum(memory) / 512}
    assert read[0]["rss_mib"] == read[0]["peak_rss_mib"] == summary and len(json.dumps(read[0])) < 1000
    assert read[2]["rss_mib"] == memory
    found = board(tmp_path)
    assert [e.value for e in found.Scalars("memory_mib/rank_of_highest")] == [300, 300, 300]
    assert [e.step for e in found.Scalars("memory_mib/rank_511")] == [100]


def test_each_of_several_tasks_has_a_loss_curve_of_its_own(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(), 4, 0, "")
    for step in range(1, 5):
        monitor.step({**row(step), "source": step % 2, "source_name": ["vqa-train", "coco-train"][step % 2]})
    monitor.close()
    found = board(tmp_path)
    assert [e.step for e in found.Scalars("train/loss/vqa-train")] == [2, 4]
    assert [e.step for e in found.Scalars("train/loss/coco-train")] == [1, 3]


def test_scalars_are_thinned_but_metrics_are_not(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(every=2), 4, 0, "")
    for step in range(1, 5):
        monitor.step(row(step))
    monitor.close()
    assert [e.step for e in board(tmp_path).Scalars("train/loss")] == [2, 4]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_graph_has_a_point_in_each_step_in_which_it_was_measured(tmp_path):
    monitor = Monitor(tmp_path, MonitorOptions(every=4), 8, 0, "")
    for step in range(1, 9):
        monitor.step(row(step, **({"graph": {"edges": float(step)}} if step % 3 == 0 else {})))
    monitor.close()
    found = board(tmp_path)
    assert [(p.step, p.value) for p in found.Scalars("graph/edges")] == [(3, 3.0), (6, 6.0)]
    assert [p.step for p in found.Scalars("train/loss")] == [4, 8]


def test_a_continued_run_appends(tmp_path):
    for start in (0, 2):
        monitor = Monitor(tmp_path, MonitorOptions(tensorboard=False), 4, start, "")
        monitor.step(row(start + 1))
        monitor.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3]


def test_the_page_shows_right_answers_green_and_wrong_ones_red():
    image = torch.zeros(3, 4, 4)
    right = page([(image, [{"text": "q", "prediction": "yes", "answers": ["yes"]}])])
    wrong = page([(image, [{"text": "q", "prediction": "yes", "answers": ["no"]}])])

    def has(sheet, channel):
        others = [c for c in range(3) if c != channel]
        return bool(((sheet[channel] > 0.3) & (sheet[others].amax(0) < 0.25)).any())

    assert has(right, 1) and not has(right, 0)
    assert has(wrong, 0) and not has(wrong, 1)


def test_a_text_that_the_font_lacks_does_not_stop_the_run():
    sheet = page([(torch.zeros(3, 4, 4), [{"text": "何色ですか" * 20, "prediction": "赤"}])])
    assert sheet.dim() == 3 and sheet.shape[0] == 3 and sheet.max() > 0


def test_the_letters_of_the_page_are_readable_where_it_is_shown_small():
    """TensorBoard shows the page at about half its size: 10 pixels for a letter are left of 18 or more."""
    assert PAGE.font >= 18 and PAGE.columns * PAGE.tile <= 1000


def test_retrieval_without_pictures_has_a_page_with_names_and_ranks():
    """A run on stored features without thumbnails had no page at all."""
    sheet = page([(None, [{"sample_id": "own/val-3", "text": "", "prediction": "a red circle", "rank": 4}])])
    assert sheet.shape[0] == 3 and sheet.min() < 0.2
    first = page([(None, [{"sample_id": "own/val-3", "text": "", "prediction": "a red circle", "rank": 1}])])
    green, red = ((s[c] - s[1 - c] > 0.2).any() for s, c in ((first, 1), (sheet, 0)))
    assert green and red


def test_a_caption_stands_beside_the_given_one_and_is_neither_right_nor_wrong():
    row = {"sample_id": "a", "text": "", "prediction": "a red circle", "references": ["a blue circle", "one circle"]}
    assert _result(row) == ("-> a red circle (given: a blue circle)", "darkblue")
    assert _result({**row, "references": []}) == ("-> a red circle", "darkblue")
    assert _result({"prediction": "red", "answer": "blue"})[1] == "firebrick"
