"""Conversations with images in unusual places, and templates that do not merely append: tokens and logits are those of
the family's own processor and stock class for the same messages."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.errors import BadInput
from tests.helpers.models import family_traits, tiny_families
from tests.helpers.models.family_samples import batch, image
from tests.helpers.models.family_stock import ASKED, OF_LLAVA, made, stock, tolerance
from tests.helpers.models.family_traits import EVERY

QUICK = ("llava", "qwen2_vl", "internvl")
SLOW = [f for f in family_traits.having("turns") if f not in QUICK]
# Of several images in a chat its stock class reads no tiles.
ONE_IMAGE = ("llava_onevision",)
QUESTION, SAID = "what color ?", "red"


def message(role: str, *pieces: int | str) -> dict:
    """Of texts, and images by their numbers."""

    def picture(number: int) -> Image.Image:
        return Image.fromarray(image(number).permute(1, 2, 0).numpy())

    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": picture(p)} for p in pieces
    ]
    return {"role": role, "content": content}


def user(*pieces: int | str) -> dict:
    return message("user", *pieces)


def said(words: str = SAID) -> dict:
    return message("assistant", words)


# numbers of images, the conversation here, and as messages of transformers
CHATS = {
    "before the system text": (
        [1],
        Prompted(QUESTION, SAID, (("system", "<image> a"),)),
        [message("system", 1, " a"), user(QUESTION), said()],
    ),
    "after a system text": (
        [1],
        Prompted(f"<image>{QUESTION}", SAID, (("system", "a a"),)),
        [message("system", "a a"), user(1, QUESTION), said()],
    ),
    "beside each other": (
        [1, 2],
        Prompted("what <image><image> color ?", SAID),
        [user("what ", 1, 2, " color ?"), said()],
    ),
    "last": ([1], Prompted(f"{QUESTION}<image>", SAID), [user(QUESTION, 1), said()]),
    "nowhere": (
        [],
        Prompted(QUESTION, SAID, (("user", "what ?"), ("assistant", "blue"))),
        [user("what ?"), said("blue"), user(QUESTION), said()],
    ),
    "without a word": ([1], Prompted("<image>", SAID), [user(1), said()]),
    "in the last turn alone": (
        [2],
        Prompted(f"<image>{QUESTION}", SAID, (("user", "what ?"), ("assistant", "blue"))),
        [user("what ?"), said("blue"), user(2, QUESTION), said()],
    ),
    "one in each turn": (
        [1, 2, 3],
        Prompted(
            f"{QUESTION}<image>",
            SAID,
            (("user", "<image>what ?"), ("assistant", "blue"), ("user", "is <image> a ?"), ("assistant", "no")),
        ),
        [user(1, "what ?"), said("blue"), user("is ", 2, " a ?"), said("no"), user(QUESTION, 3), said()],
    ),
}
BODY = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ 'MARK' }}{% else %}{{ ' ' + c['text'] }}{% endif %}"
    "{% endfor %}{{ ' </turn> ' }}"
)
TEMPLATES = {
    # as LLaVA-OneVision: an answer begins otherwise than it is asked for
    "another beginning": "{% for m in messages %}{{ '<turn> ' + m['role'] + ' : ' }}" + BODY + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ? ' }}{% endif %}",
    # as models that think: no thoughts in the answers of earlier turns
    "thoughts": "{% set ns = namespace(at=0) %}{% for m in messages if m['role'] == 'user' %}"
    "{% set ns.at = ns.at + 1 %}"
    "{% endfor %}{% set past = namespace(at=0) %}{% for m in messages %}{{ '<turn> ' + m['role'] + ' ' }}"
    "{% if m['role'] == 'user' %}{% set past.at = past.at + 1 %}{% endif %}"
    "{% if m['role'] == 'assistant' and past.at == ns.at %}{{ 'b c ' }}{% endif %}" + BODY + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant b ' }}{% endif %}",
}

MERELY_APPENDS = (
    "{% for m in messages %}{{ '<turn> ' + m['role'] + ' ' }}" + BODY + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return family_traits.write(tmp_path_factory.mktemp(request.param), request.param)


def read_both(backbone, model, images, text, messages):
    """Tokens of the conversation as the model reads them, their labels, the outputs, and what the processor makes."""
    packed = batch(backbone, (images, [text]))
    given = backbone.inputs(packed)
    features = model.media_features(given["images"], given["videos"])
    texts = (given["input_ids"], given["attention_mask"], given["labels"])
    widened = model.widen(*texts, features, given["media_rows"])
    theirs = of_processor(backbone, messages)
    floats = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in theirs.items()}
    out = backbone.read(model(**given), packed)
    return widened.input_ids[0].tolist(), widened.labels[0], out, floats


def of_processor(backbone, messages):
    """What transformers makes of the messages; an answer ends with the end token, also where the template has none."""
    family, processor, template = backbone._config.model_type, backbone._processor, backbone._chat.template
    if family in ("llava", "llava_next"):
        vars(processor).update(OF_LLAVA)
        ended = "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt"
        template = template.replace("{% endfor %}{% if add_generation_prompt", ended)
    pictures = [piece["image"] for m in messages for piece in m["content"] if piece["type"] == "image"]
    if pictures and family != "got_ocr2":
        given = {"return_mm_token_type_ids": True} if family in ASKED else {}
        return processor.apply_chat_template(
            [messages], chat_template=template, tokenize=True, return_dict=True, return_tensors="pt", **given
        )
    words = backbone._tokenizer
    text = words.apply_chat_template(messages, chat_template=template, tokenize=False)
    if pictures:  # as lists of one conversation each that processor takes pages alone
        return processor(text=[text], images=pictures, return_tensors="pt")
    read = processor if backbone._chat.opening else words  # some processors take no text alone
    made = read(text=[text], return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("folder", [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)], indirect=True)
@torch.no_grad()
def test_images_may_stand_anywhere(folder):
    backbone, model = made(folder)
    reference = stock(folder, backbone)
    for where, chat in CHATS.items():
        if len(chat[0]) > 1 and backbone._config.model_type in ONE_IMAGE:
            continue
        ids, labels, out, theirs = read_both(backbone, model, *chat)
        assert ids == theirs["input_ids"][0].tolist(), where
        expected = reference(**theirs).logits[0, (labels != -100).nonzero()[:, 0] - 1]
        got = out.logits[0][out.labels[0] != -100]
        assert (got - expected).abs().max() <= tolerance(backbone) * expected.abs().max(), where


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in EVERY])
def test_every_family_that_is_not_compared_here_refuses_conversations(tmp_path, family):
    one_turn = ENTRY(Options(family_traits.write(tmp_path, family)), None).one_turn
    lacking = family_traits.lacking("turns", family)
    assert one_turn == "" if lacking is None else lacking.said in one_turn


@pytest.fixture(scope="module", params=TEMPLATES)
def changing(request, tmp_path_factory):
    """A backbone whose template changes what it has rendered, its model, and the name of the template."""
    path = tmp_path_factory.mktemp("changing")
    folder = tiny_families.write(path, "internvl")
    (path / "t.jinja").write_text(TEMPLATES[request.param].replace("MARK", tiny_families.FAMILIES["internvl"].mark))
    return *made(folder, chat_template=str(path / "t.jinja")), request.param, folder


@torch.no_grad()
def test_answers_are_found_where_a_template_changes_what_it_has_rendered(changing):
    backbone, model, name, folder = changing
    reference, words = stock(folder, backbone), backbone._tokenizer
    assert not backbone._chat._appends
    for where, (images, text, messages) in CHATS.items():
        ids, labels, out, theirs = read_both(backbone, model, images, text, messages)
        assert ids == theirs["input_ids"][0].tolist(), where
        answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
        assert words.decode(labels[labels != -100]).split() == " </turn> ".join([*answers, ""]).split(), where
        expected = reference(**theirs).logits[0, (labels != -100).nonzero()[:, 0] - 1]
        got = out.logits[0][out.labels[0] != -100]
        assert (got - expected).abs().max() <= tolerance(backbone) * expected.abs().max(), where
    asked, header = words.decode(ids).split("<turn>")[-1].split(SAID)[0].split(), {"thoughts": ["b", "c"]}
    assert asked == ["assistant", *header.get(name, [":"])]


@torch.no_grad()
def test_a_question_ends_where_its_answer_would_begin(changing):
    """Evaluation, which knows the answer, and prediction, which does not, ask alike."""
    backbone, _, _, _ = changing
    chat = backbone._chat
    for _, text, _ in CHATS.values():
        known, open_ = chat.encode(text), chat.encode(Prompted(text.prompt, "", text.turns))
        assert open_.ids == known.ids[: known.prompt_length] and open_.prompt_length == len(open_.ids)
        assert [n for n in open_.labels if n != -100] == [n for n in known.labels[: known.prompt_length] if n != -100]


@pytest.mark.parametrize(
    "answer", ["\ue000", "\ue000 red", "red \ue000", "\ue000 red \ue001", "red </turn> blue", " red "]
)
def test_answers_with_any_letters_and_empty_ones_are_found(changing, answer):
    backbone, _, _, _ = changing
    chat = backbone._chat
    encoded = chat.encode(
        Prompted(QUESTION, answer, (("user", "what ?"), ("assistant", ""), ("user", "a ?"), ("assistant", SAID)))
    )
    labels = chat.tokenizer.decode([label for label in encoded.labels if label != -100]).split("</turn>")
    assert [words.strip() for words in labels[:2]] == ["", "red"] and labels[3:] == [""]
    expected = chat._plain(Prompted("", answer))[0].target
    assert labels[2].split() == chat.tokenizer.decode(chat.tokenizer(expected)["input_ids"]).split()


@pytest.mark.parametrize("template", [*TEMPLATES.values(), MERELY_APPENDS], ids=[*TEMPLATES, "appends"])
def test_a_template_that_asks_for_a_system_text_gets_it_when_it_is_tried(tmp_path, template):
    folder = tiny_families.write(tmp_path, "internvl")
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system text') }}{% endif %}"
    text = needs + template.replace("MARK", tiny_families.FAMILIES["internvl"].mark)
    (tmp_path / "t.jinja").write_text(text)
    backbone, _ = made(folder, chat_template=str(tmp_path / "t.jinja"), system="a a")
    assert backbone._chat._appends == (template == MERELY_APPENDS)


def test_a_changing_template_without_an_end_of_answers_is_refused_in_one_line(tmp_path):
    folder = tiny_families.write(tmp_path, "internvl")
    mark = tiny_families.FAMILIES["internvl"].mark
    (tmp_path / "t.jinja").write_text(TEMPLATES["thoughts"].replace("MARK", mark).replace(" </turn> ", " . "))
    with pytest.raises(BadInput, match="changes when a turn is added, and no end token </turn> follows") as error:
        made(folder, chat_template=str(tmp_path / "t.jinja"))
    assert "\n" not in str(error.value)
