"""Texts as token ids in every family: control tokens in data are words, cuts spare what matters, both are counted."""

import pytest
import torch

from mmpeft_ds.backbones.blip.backbone import ENTRY as Blip
from mmpeft_ds.backbones.common.texts import TextIds, Words, fitted
from mmpeft_ds.backbones.mllm.backbone import ENTRY as Mllm
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers.models import tiny_blip, tiny_mllm, tiny_tokenizers
from tests.helpers.models.tiny_backbones import MAKERS

SENTENCES = ["what color is the big red circle", "a blue square is there", "is it round"]


def make_blip_vqa(folder):
    return Blip(Blip.Options(tiny_blip.write(folder, "vqa"), form="vqa"), None)


def make_blip_retrieval(folder):
    return Blip(Blip.Options(tiny_blip.write(folder, "retrieval"), form="retrieval"), None)


def make_llava(folder):
    return Mllm(Mllm.Options(tiny_mllm.write(folder, "llava")), None)


EVERY = {**MAKERS, "blip_vqa": make_blip_vqa, "blip_retrieval": make_blip_retrieval, "llava": make_llava}


@pytest.fixture(scope="module", params=EVERY)
def backbone(request, tmp_path_factory):
    return EVERY[request.param](tmp_path_factory.mktemp(request.param))


def given(backbone, question, answer):
    return Prompted(question, answer) if backbone.generates else f"{question} {answer}"


def controls(backbone):
    """Control tokens of the family's tokenizer, but for the token of unknown words, which tiny vocabularies need."""
    unknown = backbone._tokenizer.unk_token
    return [token for token in backbone._tokenizer.all_special_tokens if token != unknown] + ["<image>"]


def special_ids(backbone, texts):
    """How often each control token stands in what the model reads and learns, padding left out."""
    ids = texts["input_ids"]
    kept = ids[texts["attention_mask"].bool()] if "attention_mask" in texts else ids.flatten()
    said = texts["labels"].flatten() if backbone.generates else kept[:0]
    specials = {i for i in backbone._tokenizer.all_special_ids if i != backbone._tokenizer.unk_token_id}
    return sorted(i for i in (*kept.tolist(), *said.tolist()) if i in specials)


def learnt(backbone, texts):
    """The ids that the model learns to say, or else those that it reads."""
    ids = texts["labels"] if backbone.generates else texts["input_ids"]
    return [i for i in ids.flatten().tolist() if i != -100]


def test_control_tokens_in_a_text_are_words_and_what_stands_behind_them_is_kept(backbone, monkeypatch):
    words = backbone._tokenizer.get_vocab()
    plain = backbone.collate_texts([given(backbone, "what color is it", "red circle")])
    for token in controls(backbone):
        texts = backbone.collate_texts([given(backbone, "what color is it", f"red {token} circle")])
        assert special_ids(backbone, texts) == special_ids(backbone, plain), token
        after = learnt(backbone, texts)
        assert words["circle"] in after[after.index(words["red"]) :], token
        if token == "<image>" and isinstance(backbone, Mllm):
            continue  # in a question it is the place of an image
        asked = backbone.collate_texts([given(backbone, f"what {token} color {token} is it", "red circle")])
        assert special_ids(backbone, asked) == special_ids(backbone, plain), token
        if token in backbone._tokenizer.all_special_tokens:
            assert texts.changes[0, 2] == 1 and asked.changes[0, 2] == 2
    assert plain.changes.tolist() == [[0, 0, 0]]
    # as transformers' tokenizers read them, they are control tokens: the check above would fail
    monkeypatch.setattr(TextIds, "plain", lambda self, text: (text, 0))
    monkeypatch.setattr(TextIds, "refuse_control", lambda self, ids, text: None)
    token = controls(backbone)[0]
    broken = backbone.collate_texts([given(backbone, "what color is it", f"red {token} circle")])
    assert special_ids(backbone, broken) != special_ids(backbone, plain)


@pytest.mark.parametrize("family", tiny_tokenizers.FAMILIES)
def test_every_kind_of_tokenizer_reads_a_control_token_as_its_characters(family):
    tokenizer = tiny_tokenizers.FAMILIES[family]([*SENTENCES, "[ SEP ] [ P A D ]"])
    texts, specials = TextIds(tokenizer), {tokenizer.convert_tokens_to_ids(t) for t in ("[PAD]", "[CLS]", "[SEP]")}
    for token in ("[SEP]", "[PAD]", "[CLS]"):
        text = f"red {token} circle {token}{token} blue"
        (words,) = texts.words([text])
        assert words.control == 3 and not specials & set(words.ids)
        decoded = tokenizer.decode(words.ids)
        assert "circle" in decoded and "blue" in decoded
        assert specials & set(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_look_alike_that_the_tokenizer_makes_a_control_token_of_is_a_bad_sample():
    tokenizer = tiny_tokenizers.sentence_piece([*SENTENCES, "\uff3bx\uff3d"])
    look_alike = "red \uff3bSEP\uff3d circle"
    assert tokenizer.sep_token_id in tokenizer(look_alike, add_special_tokens=False)["input_ids"]
    with pytest.raises(BadSample, match=r"control: the tokenizer reads '\[SEP\]'"):
        TextIds(tokenizer).words([look_alike])


def test_a_prompt_loses_its_middle_and_a_target_its_end():
    prompt, target = Words([1, 2, 3, 4, 5, 6]), Words([7, 8, 9])
    assert fitted(prompt, target, 9) == (prompt, target)
    for room, asked, answered in ((8, [1, 2, 3, 5, 6], [7, 8, 9]), (5, [1, 2, 6], [7, 8]), (2, [1], [7])):
        shorter, said = fitted(prompt, target, room)
        assert (shorter.ids, said.ids) == (asked, answered)
        assert (shorter.cut, said.cut) == (6 - len(asked), 3 - len(answered))
    assert fitted(Words([]), target, 2)[1].ids == [7, 8]


def test_a_long_question_keeps_both_ends_and_its_answer_and_is_counted(backbone):
    limit = 19
    backbone.options.max_text_length, before = limit, backbone.options.max_text_length
    backbone.__dict__.pop("_chat", None)
    try:
        question = "is there " + "a big blue square " * 12 + "what color is it"
        texts = backbone.collate_texts([given(backbone, question, "red circle"), given(backbone, "is it", "red")])
    finally:
        backbone.options.max_text_length = before
        backbone.__dict__.pop("_chat", None)
    assert texts["input_ids"].shape[1] <= limit
    assert texts.changes[0, 0] > 0 and texts.changes[0, 1:].tolist() == [0, 0] and texts.changes[1].tolist() == [0] * 3
    words = backbone._tokenizer.get_vocab()
    read = texts["input_ids"][0].tolist()
    is_caption = (
        backbone.embeds
        or backbone.options.__class__.__module__.endswith("blip.options")
        and (backbone.options.form == "retrieval")
    )
    if is_caption:  # loses its end
        assert words["is"] in read and words["circle"] not in read
        return
    assert words["is"] in read and words["color"] in read and words["it"] in read
    if backbone.generates:
        labels = [i for i in texts["labels"][0].tolist() if i != -100]
        assert [i for i in labels if i in (words["red"], words["circle"])] == [words["red"], words["circle"]]


# conversations


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def folder(request, tmp_path_factory):
    return request.param, tiny_mllm.write(tmp_path_factory.mktemp(request.param), request.param)


def chat(folder, length, **options):
    backbone = Mllm(Mllm.Options(folder[1], max_text_length=length, **options), None)
    backbone.check()
    return backbone, backbone._chat


TURNS = (
    ("user", "<image>\nis there a circle ?"), ("assistant", "no ."),
    ("user", "is it round ?"), ("assistant", "yes ."),
)  # fmt: skip


def test_a_long_conversation_loses_its_oldest_turns_but_neither_image_nor_system_text(folder):
    turns = (("system", "big blue"), *TURNS)
    whole = chat(folder, 200)[1].encode(Prompted("what color is it ?", "red .", turns, images=1))
    backbone, short = chat(folder, len(whole.ids) - 1)
    words = backbone._tokenizer
    encoded = short.encode(Prompted("what color is it ?", "red .", turns, images=1))
    text = words.decode(encoded.ids)
    assert len(encoded.ids) <= len(whole.ids) - 1 and encoded.cut == len(whole.ids) - len(encoded.ids)
    assert "there" not in text and "round" in text and "what color is it ?" in text and "big blue" in text
    assert encoded.ids.count(tiny_mllm.IMAGE) == 1
    assert [words.decode([i]) for i in encoded.labels if i != -100][:2] == ["yes", "."]
    # the place of an image that the sample has, without a mark for it
    unmarked = tuple((role, content.removeprefix("<image>\n")) for role, content in turns)
    assert short.encode(Prompted("what color is it ?", "red .", unmarked, images=1)).ids == encoded.ids


def test_a_long_question_keeps_the_header_of_the_answer_and_all_images(folder):
    backbone, short = chat(folder, 26)
    words, long = backbone._tokenizer, "what color is <image> " + "and the big square " * 30 + "same shape ?"
    for target in ("", "red ."):
        encoded = short.encode(Prompted(long, target, TURNS[2:], images=1))
        assert len(encoded.ids) <= 26 and encoded.cut > 0 and encoded.cut_answer == 0
        before = words.decode(encoded.ids[: encoded.prompt_length])
        assert before.endswith("assistant" if folder[0] == "qwen2_vl" else "ASSISTANT :")
        assert "same shape ?" in before and "what" in before and "round" not in before
        assert encoded.ids.count(tiny_mllm.IMAGE) == 1
    assert words.decode([i for i in encoded.labels if i != -100]) == f"red . {words.eos_token}"


def test_a_long_answer_loses_its_end_and_does_not_learn_to_end_there(folder):
    backbone, short = chat(folder, 32)
    words = backbone._tokenizer
    encoded = short.encode(Prompted("what shape is it ?", "a big red circle and " * 30))
    labels = words.decode([i for i in encoded.labels if i != -100])
    assert len(encoded.ids) <= 32 and encoded.cut == 0 and encoded.cut_answer > 0
    assert labels.startswith("a big red circle") and words.eos_token not in labels
    assert "what shape is it ?" in words.decode(encoded.ids)
    both = short.encode(Prompted("what shape is it ? " * 20, "a big red circle and " * 30))
    assert both.cut > 0 and both.cut_answer > 0 and len(both.ids) <= 32
    assert sum(i != -100 for i in both.labels) > 1


def test_images_that_leave_no_room_for_a_question_make_a_bad_sample(folder):
    backbone, short = chat(folder, 26)
    with pytest.raises(BadSample, match="leave no room for a question in max_text_length 26"):
        short.encode(Prompted("is it ?", "no", images=24))
    with pytest.raises(BadInput, match="backbone.max_text_length: .* leave no room"):
        chat(folder, 26, system="a big blue square and " * 8)


def test_a_mark_of_an_image_in_an_answer_is_no_image(folder):
    _, long = chat(folder, 100)
    for mark in ("<image>", "<video>"):
        encoded = long.encode(Prompted("<image> what shape is it ?", f"a {mark} circle", images=1))
        assert encoded.ids.count(tiny_mllm.IMAGE) == 1 and tiny_mllm.VIDEO not in encoded.ids and encoded.control == 1
        whole = long.encode(Prompted("<image> what shape is it ?", "a circle", images=1))
        assert len(encoded.ids) > len(whole.ids), "its characters are read"


def test_a_text_that_is_cut_to_its_end_in_every_batch_is_read_alike(folder):
    """Cutting depends on the text alone, not on its neighbours."""
    backbone, _ = chat(folder, 26)
    texts = [Prompted("what color is it " * 9, "red", TURNS, images=1), Prompted("is it ?", "no", images=1)]
    together = backbone.collate_texts(texts)
    alone = [backbone.collate_texts([text]) for text in texts]
    for row, one in enumerate(alone):
        length = one["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][row, :length], one["input_ids"][0])
    assert torch.equal(together.changes, torch.cat([one.changes for one in alone]))


@pytest.mark.parametrize("name", ["vision_text_decoder", "clip_bart", "blip", "blip_vqa"])
def test_earlier_turns_of_a_conversation_are_refused_by_models_of_single_questions(name, tmp_path):
    made = EVERY[name](tmp_path)
    with pytest.raises(BadInput, match="2 turns before its last question .* Use the backbone mllm"):
        made.collate_texts([Prompted("what is it", "red", TURNS[2:])])
    assert len(made.collate_texts([Prompted("what is it", "red")])["input_ids"]) == 1


def test_a_single_character_that_pads_is_text():
    tokenizer = tiny_tokenizers.byte_pairs([*SENTENCES, "!"])
    tokenizer.pad_token = "!"
    (words,) = TextIds(tokenizer).words(["red!"])
    assert words.control == 0 and tokenizer.decode(words.ids) == "red!"
