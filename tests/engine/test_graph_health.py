"""The graph in numbers and as a picture: sums over ranks, derived curves, colours of nodes and edges."""

from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.backbones.features.model import ClassificationOutput
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.thumbnails import Thumbnails
from mmpeft_ds.distributed.batch_graph import threshold_graph
from mmpeft_ds.engine import graph_health
from mmpeft_ds.engine.evaluator import _pictures
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.options import MonitorOptions

# two pairs of neighbours and one alone; the last row is padding
X = torch.tensor([[1.0, 0.0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1], [1, 0, 0]])
VALID = torch.tensor([True] * 5 + [False])
LABELS = [0, 0, 0, 1, 1, 0]


def batch():
    samples = [Sample(f"toy/test-{i:09d}", float(VALID[i]), [X[i]], [""], [LABELS[i]]) for i in range(6)]
    return pack(
        samples,
        lambda images: {"image_features": torch.stack(images)},
        lambda texts: {},
        lambda targets: {"label": torch.tensor(targets)},
    )


def outputs():
    return ClassificationOutput(graph=threshold_graph(X, 0.7, VALID), report={"other": 1.0})


def test_sums_become_degrees_and_shares():
    sums = graph_health.measure(outputs(), batch())
    assert (sums["nodes"], sums["edges"], sums["isolated"]) == (5, 4, 1)
    two = {name: 2 * value for name, value in sums.items()}  # as if another rank had found the same
    seen = graph_health.summary(two, 2)
    assert seen["mean_degree"] == pytest.approx(4 / 5) and seen["edges"] == 8 and seen["isolated"] == 2
    assert seen["same_class_share"] == 0.5 and seen["gather_ms"] == sums["gather_ms"]
    assert "nodes" not in seen


def test_other_heads_report_what_they_like_and_most_models_nothing():
    assert graph_health.measure(ClassificationOutput(report={"a": 1.0}), batch()) == {"a": 1.0}
    assert graph_health.measure(SimpleNamespace(logits=X), batch()) == {}
    assert graph_health.summary({"a": 1.0}, 2) == {"a": 1.0}


def test_the_picture_shows_neighbours_and_who_is_right():
    rows = [{"sample_id": f"toy/test-{i:09d}", "prediction": "x", "answer": "x" if i else "y"} for i in range(5)]
    seen = graph_health.view(outputs(), batch(), rows)
    assert seen.edges == [(0, 1), (2, 3)] and seen.right == [False, True, True, True, True]
    drawn = graph_health.picture(seen, lambda name: torch.ones(3, 8, 8) * 0.5)
    assert drawn.shape == (3, graph_health.SIDE, graph_health.SIDE) and drawn.min() >= 0 and drawn.max() <= 1

    def has(red, green, blue):
        wanted = torch.tensor([red, green, blue])[:, None, None] / 255
        return bool(((drawn - wanted).abs() < 1e-3).all(0).any())

    assert has(46, 139, 87) and has(205, 92, 92)  # seagreen: same class or right; indianred: other class or wrong
    assert has(127, 127, 127)  # thumbnails
    assert graph_health.view(ClassificationOutput(logits=X), batch(), rows) is None


def test_thumbnails_are_found_by_sample_id(tmp_path):
    import io

    import numpy as np
    from PIL import Image

    from tests.helpers.data import tiny_features

    def small(i):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [tiny_features.sample(i) for i in range(6)]
    for i, made in enumerate(samples):
        made.images = [("png", small(i))]
    manifest = tiny_features.write_features(tmp_path / "toy", samples)
    found = Thumbnails(manifest, "train")
    for i in (0, 3, 5):
        assert torch.equal(found(f"toy/train-{i:09d}"), torch.full((3, 8, 8), 20 * i / 255))
    assert found("toy/train-000000099") is None and found("other/train-000000000") is None
    rows = [{"sample_id": f"toy/train-{i:09d}"} for i in range(6)]
    assert [r[0]["sample_id"][-1] for _, r in _pictures(batch(), rows, 2, found)] == ["0", "1"]
    # stored features without thumbnails: the page of predictions shows the texts alone
    assert _pictures(batch(), rows, 2) == [(None, rows[:1]), (None, rows[1:2])]


@pytest.mark.parametrize(("every", "measured"), [(1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (0, [])])
def test_a_graph_is_measured_every_so_many_steps(every, measured):
    recipe = SimpleNamespace(monitor=MonitorOptions(graph_every=every))
    steps = [SimpleNamespace(recipe=recipe, state=SimpleNamespace(step=done)) for done in range(6)]
    assert [step.state.step + 1 for step in steps if Stepper.measures_graph.fget(step)] == measured


def test_a_number_of_steps_below_0_is_refused():
    with pytest.raises(BadInput, match="graph_every: -1 is below 0"):
        MonitorOptions(graph_every=-1)
