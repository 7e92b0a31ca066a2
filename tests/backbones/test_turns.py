"""Conversations of several turns: families and templates that cannot mark turns refuse them in one line, and families
whose checkpoints bring no template have one that writes what their own processor writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmpeft_ds import recipe as recipes
from mmpeft_ds import registry
from mmpeft_ds.backbones.mllm import families
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.backbones.mllm.rendering import Rendering
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.engine.assembly import checks
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_families

WITHOUT = [
    f.model_types[0] for f in (registry.load(families, n, "tests") for n in registry.names(families)) if f.template
]
TALK = Prompted("what ?", "red", (("user", "is ?"), ("assistant", "no")), images=1)
SYSTEM = Prompted("what ?", "red", (("system", "a a"),), images=1)
# a template that marks no turns
RUN_ON = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}"
    "{{ c['text'] + '\n' }}{% endif %}{% endfor %}{% endfor %}"
)


def without_template(folder: Path, family: str, **options) -> ENTRY:
    """The backbone of a tiny checkpoint that brings no chat template."""
    tiny_families.write(folder, family)
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)
    return ENTRY(Options(str(folder), **options), None)


@pytest.mark.parametrize("family", WITHOUT)
def test_a_family_without_a_template_of_its_own_marks_turns_or_refuses_them(tmp_path, family):
    backbone = without_template(tmp_path, family)
    backbone.check()
    assert backbone._chat.template == backbone._family.template
    if not backbone.one_turn:
        backbone._chat.encode(TALK)
        return
    for text, what in ((TALK, "earlier turns"), (SYSTEM, "a system text")):
        with pytest.raises(BadInput, match=f"backbone: {what} before .* one question and one answer") as error:
            backbone._chat.encode(text)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="a system text before .* leave backbone.system empty"):
        ENTRY(Options(str(tmp_path), system="a a"), None).check()


def test_a_template_of_the_user_does_not_help_a_family_that_reads_one_question_alone(tmp_path):
    folder = tiny_families.write(tmp_path, "paligemma")
    Path(tmp_path, "t.jinja").write_text(tiny_families.TEMPLATE.format(mark="<image>", video=""))
    backbone = ENTRY(Options(folder, chat_template=str(tmp_path / "t.jinja")), None)
    backbone.check()
    with pytest.raises(BadInput, match="or take another model"):
        backbone._chat.encode(TALK)


def test_a_template_that_marks_no_turns_refuses_conversations_alone(tmp_path):
    folder = tiny_families.write(tmp_path, "internvl")
    mark = tiny_families.FAMILIES["internvl"].mark
    Path(tmp_path, "t.jinja").write_text(RUN_ON.replace("<image>", mark))
    backbone = ENTRY(Options(folder, chat_template=str(tmp_path / "t.jinja")), None)
    with pytest.raises(BadInput, match="nothing between an answer and the next question.* a backbone.chat_template"):
        backbone._chat.encode(TALK)
    backbone._chat.encode(SYSTEM)
    backbone.check()  # data with one question each it serves
    assert ENTRY(Options(folder), None).one_turn == ""


def test_data_with_conversations_are_refused_at_the_start_where_the_model_reads_one_question(tmp_path):
    recipe = recipes.Recipe(run_dir="run", backbone={"name": "mllm"}, method={"name": "lora"})
    backbone = without_template(tmp_path / "paligemma", "paligemma")
    options = SourceOptions(dir="data", split="train", task={"name": "instruction"})
    for most, refused in ((4, True), (3, False)):
        held = {"conversations": {"type": "list", "present": 2, "min": 2, "mean": 3, "max": most}}
        manifest = Manifest("name", "", {}, 1, {}, {}, {"train": held}, dir="data")
        if not refused:
            checks.check_held(recipe, "data.sources.0", options, manifest, backbone)
            continue
        with pytest.raises(BadInput, match="data .train. holds conversations of up to 4 turns, but .*gemma") as error:
            checks.check_held(recipe, "data.sources.0", options, manifest, backbone)
        assert "\n" not in str(error.value)


def test_got_ocr_asks_as_its_own_processor_does(tmp_path):
    """With one page, and with two, which that processor writes between one pair of tokens."""
    backbone = without_template(tmp_path, "got_ocr2")
    pages, kinds = [Image.new("RGB", (30, 20))] * 2, backbone._tokenizer.convert_tokens_to_ids
    for images in (1, 2):
        words = " OCR across multi pages: " if images == 2 else " OCR: "
        given = {"multi_page": True} if images == 2 else {}
        theirs = backbone._processor(images=pages[:images], return_tensors="pt", **given)["input_ids"][0].tolist()
        ours = backbone._chat.encode(Prompted(words, images=images)).ids
        page, length = kinds("<imgpad>"), backbone._processor.num_image_tokens
        assert [n for i in ours for n in ([i] * length if i == page else [i])] == theirs and page in ours


def test_the_rendering_says_that_turns_are_marked_by_what_stands_between_them():
    """By a role, by an end token, or by nothing but white space."""
    words = tiny_families.tokenizer(tiny_families.FAMILIES["internvl"])
    for between, marked in (("USER: ", True), ("</turn>", True), ("\n \n", False)):
        text = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{{ BETWEEN }}{% endfor %}"
        made = Rendering(words, text.replace("BETWEEN", repr(between)), ("<image>",), "<image>", "")
        assert (made.unmarked == "") == marked
