#!/usr/bin/env bash
# transformers and tokenizers: truncation used in one call is saved into tokenizer.json and cuts texts for later readers.
#
# A good guess: truncation=True, max_length=4 are arguments of a call and leave the tokenizer as it was.
# What happens: they are set on the shared fast tokenizer and written by the next save_pretrained. AutoTokenizer resets them
#   at each call, so that transformers notices nothing; tokenizers.Tokenizer.from_file (and what is built on it: inference
#   servers, exports to other languages) cuts every text at 4 tokens.
# Source: transformers.tokenization_utils_tokenizers.TokenizersBackend.set_truncation_and_padding, tokenizers.Tokenizer.save.
# Who is hurt: checkpoints saved after a training loop that truncated its batches, served by another program.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import json, pathlib
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizer

words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red bus on the street".split()
pathlib.Path("vocab.txt").write_text("\n".join(words) + "\n")
tokenizer, text = BertTokenizer.from_pretrained("."), "a red bus on the street"
lengths = {}
for name in ("before", "after"):
    tokenizer.save_pretrained(name)
    lengths[name] = (len(Tokenizer.from_file(f"{name}/tokenizer.json").encode(text).ids),
                     len(AutoTokenizer.from_pretrained(name)(text).input_ids))
    print(f"saved {name} a call with max_length=4: tokens by tokenizers {lengths[name][0]}, by transformers {lengths[name][1]}; "
          f"truncation in tokenizer.json: {json.loads(pathlib.Path(name, 'tokenizer.json').read_text())['truncation']}")
    tokenizer(text, truncation=True, max_length=4)
assert lengths == {"before": (8, 8), "after": (4, 8)}, lengths
PY
