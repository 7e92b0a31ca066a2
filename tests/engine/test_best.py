"""Which evaluation is the best of a run, and how many have passed without a better score."""

from types import SimpleNamespace

import pytest

from mmpeft_ds.engine import training
from mmpeft_ds.engine.evaluator import Evaluation
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.training import Training
from mmpeft_ds.engine.turns import exhausted

NAN = float("nan")


@pytest.mark.parametrize(
    ("better", "evaluations", "best_step", "waited"),
    [
        ("max", [(0.0, 3.0), (0.0, 2.0), (0.0, 2.5)], 2, 2),
        ("max", [(0.0, 2.0), (0.0, 2.0), (0.0, NAN)], 1, 2),
        ("max", [(0.0, NAN), (0.0, 2.0)], 1, 1),
        ("max", [(0.5, 3.0), (0.4, 1.0)], 1, 1),
        ("max", [(0.5, 1.0), (0.6, 3.0)], 2, 0),
        ("min", [(7.0, 3.0), (7.0, 2.0), (8.0, 1.0)], 2, 2),
    ],
)
def test_of_equal_scores_the_one_with_the_lowest_loss_is_the_best(monkeypatch, better, evaluations, best_step, waited):
    monkeypatch.setattr(training, "titles", lambda sources: ["val"])
    run = object.__new__(Training)
    task = SimpleNamespace(main_metric="score", better=better)
    run.resolved = SimpleNamespace(validation=[SimpleNamespace(task=task)])
    run.state, run.report = TrainState(), lambda say: None
    for step, (score, loss) in enumerate(evaluations, start=1):
        run.state.step = step
        result = Evaluation({"score": score, "loss": loss}, weight=1.0)

        def evaluating(index, result=result):
            yield from ()
            return result

        run.evaluating = evaluating
        best = exhausted(run.validate())
        assert best == (run.state.best_step == step)
    assert run.state.best_step == best_step and run.state.evaluations_without_improvement == waited
    assert run.state.extra["best_scores"]["loss"] in (evaluations[best_step - 1][1], "nan")


def test_the_best_after_a_calibration_is_of_the_step_whose_weights_were_calibrated(monkeypatch):
    monkeypatch.setattr(training, "titles", lambda sources: ["val"])
    monkeypatch.setattr(training.calibrate, "head", lambda model: object())
    monkeypatch.setattr(training.calibrate, "rows_of", lambda *args: None)
    monkeypatch.setattr(training.calibrate, "run", lambda *args: {"tau": 0.5})
    stream = SimpleNamespace(epoch=lambda number: iter(()), close=lambda: None)
    monkeypatch.setattr(training, "make_stream", lambda *args, **kwargs: stream)
    source = SimpleNamespace(task=SimpleNamespace(main_metric="score", better="max"))
    run = object.__new__(Training)
    run.resolved = SimpleNamespace(validation=[source], train=[source], backbone=None)
    run.built, run.ranks = SimpleNamespace(model=None, engine=None), SimpleNamespace(device="cpu")
    run.state, run.writer = TrainState(step=50, best=0.4, best_step=20), None
    run.observer = SimpleNamespace(evaluation=lambda *args: None)

    def evaluating(index):
        yield from ()
        return Evaluation({"score": 0.5, "loss": 1.0}, weight=1.0)

    run.evaluating, run.save = evaluating, lambda best: None
    assert run.calibrate(20) == {"tau": 0.5}
    assert (run.state.best, run.state.best_step, run.state.step) == (0.5, 20, 50)
