"""Every method on its paper's backbone: 2 ranks under ZeRO-3 train as one plain process without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import launch, plain_methods
from tests.helpers.runs import tiny_pairs

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.pairs"


def case(method: str, backbone: str, suffix: str = "", **options) -> dict:
    ours = {
        k: options.pop(k)
        for k in (
            "gradient_checkpointing",
            "reentrant",
            "skew",
            "stage",
            "zero",
            "dtype",
            "adapter_matmul",
            "back",
            "early",
            "together",
        )
        if k in options
    }
    name = "-".join(filter(None, [method, backbone, suffix]))
    return {"name": name, "backbone": backbone, "method": {"name": method, **options}, **ours}


FETCHED = {"zero": {"stage3_param_persistence_threshold": 0}}
IN_HEAD = "lm_head|.*language.*q_proj"
BART = ["text_model.model.encoder", "text_model.model.decoder"]
CASES = [
    case("routed_lora", "vision_text_decoder", r=2, route="matmul1", train_norms=True),
    case("routed_lora", "vision_text_decoder", "reentrant", r=2, gradient_checkpointing=True, reentrant=True),
    case("routed_lora", "clip_bart", r=2, route="mul", tower=BART),
    case("routed_lora", "mllm", "skew", r=2, route="none", skew=True),
    case("routed_adapter", "vision_text_encoder", r=4, route="add", train_norms=True),
    case("routed_adapter", "vision_text_decoder", r=4, route="mul"),
    case("p_adapter", "blip", r=2),
    case("p_adapter", "blip", "recompute", r=2, gradient_checkpointing=True, **FETCHED),
    case("p_adapter", "blip", "reentrant", r=2, gradient_checkpointing=True, reentrant=True),
    case("aurora", "blip_vqa", r=4),
    case("aurora", "blip_vqa", "recompute", r=4, gradient_checkpointing=True, **FETCHED),
    case("aurora", "clip", r=4),
    case("tens_lora", "vision_text_decoder", r=3, modes=["heads", "projections", "layers"]),
    case("tens_lora", "vision_text_decoder", "fetched", r=3, **FETCHED),
    case("deep_prompt", "vision_text_encoder", "prefix", style="prefix"),
    case("deep_prompt", "vision_text_encoder", "vpt", style="vpt"),
    case("adapter", "clip_bart", r=4, train_norms=True, tower=BART),
    case("uni_adapter", "blip_vqa", r=4),
    # a bias of the keys has no gradient but rounding, which Adam would blow up
    case("bitfit", "vision_text_decoder", "skew", biases=["*.c_proj", "*.c_fc", "*.ln_?"], skew=True),
    case("layer_norm", "vision_text_encoder", "skew", skew=True),
    case("graph_lora", "blip", r=2, **FETCHED),
    case("ia3", "blip"),
    case("moka", "mllm", "skew", r=2, skew=True, **FETCHED),
    case("moka", "vision_text_decoder", "skew", r=2, skew=True),
    case("moka", "mllm", "recompute", r=2, gradient_checkpointing=True),
    case("lora", "mllm", "gathered", r=2, **FETCHED),
    case(
        "lora", "mllm", "in_head", r=2, target_modules="lm_head|.*language.*q_proj", skew=True, together=600, **FETCHED
    ),
    case("lora", "mllm", "head", r=2, modules_to_save=["lm_head"], **FETCHED),
]
HALF = {"dtype": "bfloat16", "adapter_matmul": "bfloat16"}
IN_HALF = [
    case("lora", "mllm", "half", r=2, **HALF),
    case("routed_lora", "mllm", "half", r=2, route="none", gradient_checkpointing=True, **HALF),
]
# Four ranks, as on two machines. One after the other in the same processes: a base of two checkpoints, one of one, and
# one without copies. What trains stays gathered between steps, or with a threshold of 0 is gathered where it is used.
COPIES = {"zero_hpz_partition_size": "auto"}
ON_MACHINES = [
    case("routed_lora", "vision_text_decoder", "copies", r=2, route="matmul1", zero=COPIES),
    case("routed_lora", "mllm", "copies", r=2, route="none", zero=COPIES),
    case("routed_lora", "vision_text_decoder", "no_copies", r=2, route="mul"),
    case("lora", "mllm", "back", r=2, zero=COPIES, back=True),
    case("lora", "mllm", "back_fetched", r=2, zero=COPIES | {"stage3_param_persistence_threshold": 0}, back=True),
]
TOO_EARLY = case("lora", "mllm", "early", r=2, zero=COPIES, early=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("pairs"), [*CASES, *IN_HALF], 2)


@pytest.fixture(scope="module")
def on_machines(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("machines"), [*ON_MACHINES, TOO_EARLY], 4, "2")


def trained(path: Path, cases: list[dict], ranks: int, *args: str) -> Path:
    sections = tiny_pairs.write_backbones(path, {c["backbone"] for c in cases})
    (path / "cases.json").write_text(json.dumps({"cases": cases, "backbones": sections}))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), *args, ranks=ranks)
    assert result.code == 0, result.tail()
    return path


def test_every_method_is_tried_here():
    assert {c["method"]["name"] for c in CASES} == set(plain_methods.names(heads=False))


def compare(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5, rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3, abs=1e-6)
    assert list(found["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("given", CASES, ids=lambda c: c["name"])
def test_two_ranks_under_zero3_train_as_one_plain_process(folder, given):
    sections = json.loads((folder / "cases.json").read_text())["backbones"]
    expected = tiny_pairs.train_plainly(tiny_pairs.resolved(given, sections, folder))
    compare(torch.load(folder / f"{given['name']}.pt", weights_only=False), expected)
    moved = [n for n, w in expected["weights"].items() if not torch.equal(w, expected["start"][n])]
    assert len(moved) > 0.7 * len(expected["weights"]), set(expected["weights"]) - set(moved)


@pytest.mark.parametrize("given", IN_HALF, ids=lambda c: c["name"])
def test_products_in_bfloat16_train_under_zero3_as_in_one_process_and_gradients_are_added_in_float32(folder, given):
    sections = json.loads((folder / "cases.json").read_text())["backbones"]
    result = torch.load(folder / f"{given['name']}.pt", weights_only=False)
    expected = tiny_pairs.train_plainly(tiny_pairs.resolved(given, sections, folder))
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.01)
    assert result["reduced"] == {torch.float32}
    assert {w.dtype for w in result["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("given", ON_MACHINES, ids=lambda c: c["name"])
def test_a_copy_of_the_base_on_every_machine_changes_no_number(on_machines, given):
    sections = json.loads((on_machines / "cases.json").read_text())["backbones"]
    result = torch.load(on_machines / f"{given['name']}.pt", weights_only=False)
    compare(result, tiny_pairs.train_plainly(tiny_pairs.resolved(given, sections, on_machines)))
    assert (result["copies"] > 0.9) == ("zero" in given)


def test_values_of_before_the_step_would_show_in_the_losses(on_machines):
    """Negative control: gathered before DeepSpeed drops the copies of the last step, adapters would never move."""
    stale = torch.load(on_machines / f"{TOO_EARLY['name']}.pt", weights_only=False)
    right = torch.load(on_machines / "lora-mllm-back.pt", weights_only=False)
    assert stale["losses"][0] == pytest.approx(right["losses"][0], rel=1e-5)
    assert stale["losses"][1:] != pytest.approx(right["losses"][1:], rel=1e-3)
    with pytest.raises(AssertionError):
        compare(stale, right)


def test_generative_models_are_trained_by_scores_and_not_by_logits(folder):
    """The comparison with plain training, which has logits, would hold either way."""
    scored = {c["backbone"] for c in CASES if torch.load(folder / f"{c['name']}.pt", weights_only=False)["scored"]}
    assert scored == {"mllm", "vision_text_decoder", "blip", "blip_vqa", "clip_bart"}


def test_the_weight_of_a_frozen_output_layer_is_gathered_once_a_micro_batch(folder):
    """One that trains is needed in the backward pass too: the control of the count."""
    frozen, trained = (
        torch.load(folder / f"lora-mllm-{name}.pt", weights_only=False)["gathers"] for name in ("gathered", "head")
    )
    assert frozen == [1] * tiny_pairs.STEPS
    assert max(trained) == 2


def test_an_output_layer_with_adapters_is_gathered_as_often_however_many_labels_a_rank_has(folder):
    """It runs in parts of a few positions here, of which the ranks have different numbers."""
    found = torch.load(folder / "lora-mllm-in_head.pt", weights_only=False)
    assert found["scored"] and max(found["gathers"]) <= 2


def test_the_comparison_notices_a_wrong_mean(folder):
    """Negative control: a gradient or a loss that is off by a per mille is found."""
    found = torch.load(folder / f"{CASES[0]['name']}.pt", weights_only=False)
    wrong = {**found, "losses": [x * 1.001 for x in found["losses"]]}
    with pytest.raises(AssertionError):
        compare(wrong, found)
