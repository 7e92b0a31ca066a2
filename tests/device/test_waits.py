"""What a step makes a GPU's host wait for, by file: the list as it stands, so that one more is seen.

Everything here is transformers' or DeepSpeed's own, but for what the engine reads once a step and for the graphs of
GA-Net, of which nobody but the features decides how many edges there are. What is `queued` are copies to the device
that nobody waits for, of numbers that are known only in the forward pass.
"""

import json
from collections import Counter

import pytest
import torch

from mmpeft_ds import methods
from tests.helpers import launch
from tests.helpers.device import matrix

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA's own kernels")
MASKS = "wait transformers/masking_utils.py"
LLM = {
    "queued mmpeft_ds/backbones/mllm/backbone.py": 1,
    "queued mmpeft_ds/backbones/mllm/model.py": 6,
    "wait transformers/utils/import_utils.py": 1,
    MASKS: 2,
}
# column of `matrix.COLUMNS` -> kind and file -> number in the forward and backward of a micro-batch
FORWARD = {
    "vision_text_encoder": {MASKS: 1},
    "vision_text_decoder": {MASKS: 2},
    "clip": {MASKS: 2},
    "clip_bart": {MASKS: 3},
    "dual_encoder": {MASKS: 1},
    "blip captioner": {MASKS: 1},
    "blip vqa": {MASKS: 3},
    "blip retrieval": {MASKS: 1},
    "mllm LLaVA": LLM | {"wait transformers/models/llava/modeling_llava.py": 1},
    "mllm Qwen2-VL": LLM
    | {
        "queued mmpeft_ds/backbones/mllm/model.py": 7,
        "copy transformers/vision_utils.py": 1,
        "wait transformers/vision_utils.py": 3,
        "wait transformers/models/qwen2_vl/modeling_qwen2_vl.py": 11,
    },
    # the teacher's texts, the model's, and those that the matching head reads
    "blip retrieval, losses": {"queued mmpeft_ds/backbones/blip/contrast.py": 2, MASKS: 6},
    "clip, losses": {MASKS: 2},
}
HEADS = {"queued mmpeft_ds/backbones/features/backbone.py": 1, "queued mmpeft_ds/tasks/classification/task.py": 1}
HEAD_COLUMNS = {"heads, stored features": HEADS, "heads, live features": HEADS | {MASKS: 2}}
PAIRS, EDGES, LISTS = (
    f"wait mmpeft_ds/{file}.py" for file in ("ops/similarity_graph", "distributed/batch_graph", "ops/graph_topk")
)
# pairs too close to the threshold for float32; edges. So few samples are one tile.
THRESHOLD = {PAIRS: 2}
# row -> what it adds: candidates too close to call, edges of the lists, those of own rows
MORE = {
    "coop": {MASKS: 1},  # the prompts, whose text tower is run again in every step
    "mmrl": {MASKS: 3},  # the prompts, and images and captions in the frozen pass
    "ga_net, threshold": THRESHOLD,
    "ga_net, tau searched": THRESHOLD,
    "ga_net, knn": {LISTS: 1, EDGES: 2},
    "moka": {"queued mmpeft_ds/backbones/mllm/model.py": 1},  # which kind each token is, known to a composed model
    "ga_net, v2": {LISTS: 1, EDGES: 2},
}
# Where image features need a gradient: transformers puts them in place with masked_scatter.
SCATTER = {"wait autograd": 1}
QUICK = ["vision_text_encoder", "mllm LLaVA", "heads, stored features"]
STEP = {
    # read before `engine.step`: norms and losses together
    "wait mmpeft_ds/engine/step.py": 1,
    MASKS: 1,
}


def per_file(reports: list[dict]) -> dict[str, int]:
    return dict(Counter(f"{r['kind']} {r['file']}" for r in reports))


def forward_and_backward(folder, methods: str, columns: list[str]) -> dict:
    out = folder / "out.json"
    result = launch.run_forked("tests.helpers.rank_scripts.device_matrix", str(out), methods, *columns, ranks=0)
    assert result.code == 0, result.tail()
    return json.loads(out.read_text())


def check(found: dict) -> None:
    for column, cells in found.items():
        assert cells, column
        for method, cell in cells.items():
            assert cell["gap"] < 1e-5, (column, method)
            counted = per_file(cell["reports"])
            if column.startswith("mllm"):
                counted = {name: number for name, number in counted.items() if name not in SCATTER}
            assert counted == listed(column, method), (column, method)


def listed(column: str, row: str) -> dict[str, int]:
    more = {} if (row, column) == ("moka", "vision_text_decoder") else MORE.get(row, {})
    return dict(Counter(FORWARD.get(column) or HEAD_COLUMNS[column]) + Counter(more))


def test_a_forward_and_backward_waits_for_what_the_list_names_and_nothing_else(tmp_path):
    check(forward_and_backward(tmp_path, "lora;routed_lora;ga_net, threshold;hegraph", QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("column", [*FORWARD, *HEAD_COLUMNS])
def test_every_method_and_head_waits_for_what_the_list_of_its_backbone_names(tmp_path, column):
    found = forward_and_backward(tmp_path, "", [column])
    check(found)
    if column == "heads, live features":
        assert {matrix.HEADS[row][0] for row in found[column]} == set(methods.names(heads=True))


@pytest.mark.slow
def test_a_step_of_the_engine_reads_the_device_once_and_gives_the_same_loss_at_every_stage(tmp_path):
    stages = (1, 3)
    cases = [
        {"name": f"zero{n}", "backbone": "vision_text_encoder", "method": {"name": "routed_lora"}, "stage": n}
        for n in stages
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script, ranks = "tests.helpers.rank_scripts.device_steps", 1
    result = launch.run_forked(script, str(tmp_path / "cases.json"), str(tmp_path), ranks=ranks)
    assert result.code == 0, result.tail()
    found = [json.loads((tmp_path / f"zero{n}.json").read_text()) for n in stages]
    for run in found:
        assert run["devices"] == ["cuda"]
        counted = {name: n for name, n in per_file(run["reports"]).items() if not name.startswith("queued")}
        assert counted == STEP
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
