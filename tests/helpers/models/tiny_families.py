"""Tiny random checkpoints of many families of image-text-to-text models, made of transformers' own configurations."""

from __future__ import annotations

import json
import string
from pathlib import Path

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.backbones.mllm import torchvision_functions
from tests.helpers.models.families import fixed, grids, qwen_glm, tiles
from tests.helpers.models.families.parts import Tiny
from tests.helpers.models.randomise import randomise

FAMILIES = qwen_glm.FAMILIES | grids.FAMILIES | tiles.FAMILIES | fixed.FAMILIES
WORDS = ["user", "assistant", "system", ":", "?", ".", "what", "is", "this", "color", "red", "blue", "yes", "no", "a"]
# Every turn is a role, its images and words, and an end; what stands for an image differs by family.
TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<turn> ' + m['role'] + ' ' }}}}{{% for c in m['content'] %}}"
    "{{% if c['type'] == 'image' %}}{{{{ '{mark}' }}}}"
    "{{% elif c['type'] == 'video' %}}{{{{ '{video}' }}}}"
    "{{% else %}}{{{{ ' ' + c['text'] }}}}{{% endif %}}{{% endfor %}}"
    "{{{{ ' </turn> ' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<turn> assistant ' }}}}{{% endif %}}"
)


def tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast:
    """A few dozen words split at spaces; special tokens are found anywhere."""
    special = ["[PAD]", "[UNK]", "<s>", "</turn>", "<turn>", *dict.fromkeys((tiny.image, *tiny.tokens))]
    # single letters and the sign for a space, since some families read any vocabulary as one of byte pairs
    words = dict.fromkeys([*special, *WORDS, *string.ascii_lowercase, "\u0120", *"012"])
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=special[4:],
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</turn>",
        chat_template=TEMPLATE.format(mark=tiny.mark, video=tiny.video) if tiny.mark else None,
        **({"extra_special_tokens": tiny.named} if tiny.named else {}),
    )


def config_of(family: str) -> transformers.PretrainedConfig:
    tiny = FAMILIES[family]
    words = tokenizer(tiny)
    parts = tiny.parts(words.convert_tokens_to_ids)
    for name, part in parts.items():
        if name == "text_config":
            part |= dict(
                vocab_size=96, pad_token_id=0, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id
            )
    return CONFIG_MAPPING[family](**parts)


def write(folder: Path, family: str) -> str:
    """A checkpoint of that family with tokenizer, image processor, settings of the processor and chat template."""
    tiny, config = FAMILIES[family], config_of(family)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    randomise(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    name, settings = tiny.image_processor
    module = torchvision_functions.module_of(name, "image")
    torchvision_functions.processor_class(module, name)(**settings).save_pretrained(folder)
    if tiny.video_processor:
        name, settings = tiny.video_processor
        Path(folder, "video_preprocessor_config.json").write_text(
            json.dumps(settings | {"video_processor_type": name})
        )
    tokenizer(tiny).save_pretrained(folder)
    Path(folder, "processor_config.json").write_text(json.dumps(tiny.processor))
    return str(folder)
