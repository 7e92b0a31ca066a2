"""Templates of thinking models: training, evaluation and prediction begin an answer alike, with thoughts and without,
and as transformers renders the same messages."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_families
from tests.helpers.models.family_samples import batch
from tests.helpers.models.family_stock import made

WORDS = (
    "{% set words %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ 'MARK' }}{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endset %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set words = words.split('</think>')[-1].lstrip() %}{% endif %}"
)
# as Qwen3.5: thoughts in the last answer alone, empty ones where it has none, and an open one where an answer is asked
LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages if m['role'] == 'user' %}{% set ns.last = ns.last + 1 %}"
    "{% endfor %}{% set at = namespace(user=-1) %}{% for m in messages %}"
    + WORDS
    + "{{ '<turn> ' + m['role'] + '\n' }}"
    "{% if m['role'] == 'user' %}{% set at.user = at.user + 1 %}{% endif %}"
    "{% if m['role'] == 'assistant' and at.user == ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ words + ' </turn>\n' }}{% endfor %}"
)
ASKS = (
    "{% if add_generation_prompt %}{{ '<turn> assistant\n' }}{% if enable_thinking is defined and enable_thinking is "
    "false %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
# in every answer, empty or not
ALWAYS = (
    "{% for m in messages %}" + WORDS + "{{ '<turn> ' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ words + ' </turn>\n' }}{% endfor %}"
)
TEMPLATES = {
    "in the last answer": LAST + ASKS,
    "in every answer": ALWAYS + ASKS,
    "in every answer, asked for without": ALWAYS
    + "{% if add_generation_prompt %}{{ '<turn> assistant\n' }}{% endif %}",
    # as GLM-4.5V: no end of an answer but the next turn
    "in every answer, which has no end": ALWAYS.replace("' </turn>\n'", "'\n'") + ASKS,
}
KNOWS = [name for name, text in TEMPLATES.items() if "enable_thinking" in text]
ENDS = [name for name, text in TEMPLATES.items() if "</turn>" in text]
TALK = (("user", "what ?"), ("assistant", "blue"))
CHATS = (
    Prompted("<image> what color ?", "red"),
    Prompted("what color ?", "red a", (("user", "<image> what ?"), ("assistant", "blue"))),
    Prompted("what color ?", "no", (("system", "a a"), *TALK)),
)
THOUGHT = "<think>\nis this a red ?\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("thinking")
    tiny_families.write(path, "internvl")
    words = AutoTokenizer.from_pretrained(path)
    words.add_tokens(["<think>", "</think>"])  # plain ones, as in Qwen's tokenizers
    words.save_pretrained(path)
    for name, text in TEMPLATES.items():
        (path / f"{name}.jinja").write_text(text.replace("MARK", tiny_families.FAMILIES["internvl"].mark))
    return path


def thinks(folder: Path, name: str, thinking: bool):
    return made(str(folder), chat_template=str(folder / f"{name}.jinja"), thinking=thinking)


def rendered(backbone, text: Prompted, **options):
    """Tokens of transformers' own rendering of the same messages, with one token for an image."""
    chat, words = backbone._chat, backbone._tokenizer
    said = words.apply_chat_template(chat._messages(text), chat_template=chat.template, tokenize=False, **options)
    return words(said.replace(chat.mark, chat.tokens[0]))["input_ids"]


def check(backbone, text: Prompted, ended: bool):
    """Hold a conversation against transformers' rendering, and its question against the same without an answer."""
    chat, asked = backbone._chat, Prompted(text.prompt, "", text.turns)
    known, open_ = chat.encode(text), chat.encode(asked)
    assert open_.ids == known.ids[: known.prompt_length] and open_.prompt_length == len(open_.ids)
    if ended:
        assert known.ids == rendered(backbone, text)
    return known, open_


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_begins_alike_whether_it_is_known_or_not(folder, name, thinking):
    if thinking and name not in ENDS:
        with pytest.raises(BadInput, match="no end token </turn> follows"):
            thinks(folder, name, thinking)
        return
    backbone, model = thinks(folder, name, thinking)
    for text in CHATS:
        known, open_ = check(backbone, text, name in ENDS)
        if name in KNOWS:
            asked = Prompted(text.prompt, "", text.turns)
            served = rendered(backbone, asked, add_generation_prompt=True, enable_thinking=thinking)
            assert open_.ids == served or name not in ENDS  # where ends are added to earlier answers
        said = backbone._tokenizer.decode([n for n in known.labels[known.prompt_length :] if n != -100]).split()
        empty = ["</think>"] if name in KNOWS else ["<think>", "</think>"]
        assert said == [*(empty if thinking else []), *text.target.split(), "</turn>"]
        images = [1] if text.marks() else []
        with torch.no_grad():
            written = [
                backbone.generate(model, batch(backbone, (images, [t])), max_new_tokens=5)
                for t in (text, Prompted(text.prompt, "", text.turns))
            ]
        assert written[0] == written[1]


@pytest.mark.parametrize("name", ENDS)
def test_thoughts_in_the_data_are_learnt_from_where_the_template_asks_for_them(folder, name):
    backbone, _ = thinks(folder, name, True)
    for text in CHATS:
        thoughtful = Prompted(text.prompt, THOUGHT + text.target, text.turns)
        known, open_ = check(backbone, thoughtful, True)
        assert open_.ids == check(backbone, text, True)[1].ids  # with thoughts and without alike
        said = backbone._tokenizer.decode([n for n in known.labels[known.prompt_length :] if n != -100]).split()
        begun = [] if name in KNOWS else ["<think>"]
        assert said == [*begun, *["is", "this", "a", "red", "?", "</think>"], *text.target.split(), "</turn>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_that_nobody_asked_for_are_refused_in_one_line(folder, name):
    backbone, _ = thinks(folder, name, False)
    with pytest.raises(BadInput, match="Set backbone.thinking: true|no end token </turn> follows") as error:
        backbone._chat.encode(Prompted("what color ?", THOUGHT + "red", TALK))
    assert "\n" not in str(error.value)


def test_answers_of_letters_that_tokens_and_images_have_too_are_found(folder):
    """The same letters before, in and behind an answer do not move its ends: 300 conversations, drawn at random."""
    backbone, _ = thinks(folder, "in the last answer", False)
    chat, draw = backbone._chat, random.Random(0)
    mark, end = chat.mark, chat.tokenizer.eos_token
    pieces = [
        *mark,
        mark[:-1],
        mark[1:],
        *end,
        end[:-1],
        end[1:],
        "<turn",
        "turn>",
        "assistant\n",
        "\n",
        " ",
        "red",
        "a",
    ]
    pieces += [mark[: len(mark) // 2], "\ue000", "\ue001", "\ue002", "im", "ima", "user"]
    for _ in range(300):
        one, two, three = ("".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(3))
        text, _ = chat._plain(
            Prompted(f"<image>{three}", two, (("user", f"{two}<image>"), ("assistant", one)), images=2)
        )
        answers = [words for role, words in text.turns if role == "assistant"] + [text.target]
        if not all(words.strip() for words in answers):
            continue
        messages = chat._messages(text)
        whole, spans, begin = chat._located(messages, chat._spellings(text))
        assert whole == chat._render(messages, chat._spellings(text)) and begin == spans[-1][0]
        assert [whole[start:stop] for start, stop in spans] == [f"{words} {end}" for words in answers]
