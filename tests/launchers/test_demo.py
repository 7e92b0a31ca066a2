"""The demo's report comes from the files of the runs, and its names stay the same."""

import importlib

import pytest

from tests.helpers import commands

KEYS = {
    "test_accuracy", "test_accuracy_yes_no", "majority", "question_only", "question_only_yes_no",
    "trainable_parameters", "total_parameters", "samples_per_second", "world_size", "zero_stage", "train_seconds",
}  # fmt: skip


@pytest.fixture
def demo(monkeypatch):
    commands.path_to_replace(monkeypatch)
    return importlib.import_module("launchers.demo")


def row(seconds: float, samples: int, memory: list[int], elapsed: float) -> dict:
    return {"step_seconds": seconds, "samples": samples, "rss_mib": memory, "elapsed": elapsed}


def test_metrics_are_collected_from_both_runs(demo, monkeypatch, capsys):
    main = [row(2.0, 10, [100, 90], 2.0 * (i + 1)) for i in range(6)] + [row(4.0, 40, [80, 120], 16.0)]
    runs = {demo.RUN: main, demo.ZERO1: [row(0.5, 10, [1, 1], 1.0)] * 6}
    monkeypatch.setattr(demo, "rows_of", runs.__getitem__)
    report = {
        "scored": 90,
        "there": 1234,
        "unit": "questions",
        "scores": {"accuracy": 0.9, "accuracy_yes_no": 0.8, "loss": 0.3},
        "baselines": {"majority": 0.3, "majority_yes_no": 0.4, "question_only": 0.6, "question_only_yes_no": 0.7},
    }
    plan = {"trainable_parameters": 5, "total_parameters": 1000, "zero_stage": 3}
    metrics = demo.collect(plan, report, {"train": 16.04})
    assert set(metrics) >= KEYS
    assert metrics["test_accuracy"] == 0.9 and metrics["question_only_yes_no"] == 0.7
    assert metrics["samples_per_second"] == pytest.approx(100 / 16) and metrics["train_seconds"] == 16.0
    assert metrics["peak_rss_mib"] == [100, 120] and metrics["world_size"] == 2
    assert (metrics["step_seconds"], metrics["step_seconds_zero1"]) == (2.0, 0.5)
    demo.show(report, metrics)
    out = capsys.readouterr().out
    assert "90 of 1,234 questions" in out
    assert "this run" in out and "question only" in out and "0.50 s at ZeRO-1" in out and "tensorboard --logdir" in out
