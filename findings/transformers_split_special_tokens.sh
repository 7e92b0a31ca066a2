#!/usr/bin/env bash
# transformers 5: split_special_tokens=True does not keep T5's or SigLIP's end token out of a text that contains "</s>".
#
# A good guess: tokenizer(text, split_special_tokens=True) reads special tokens that stand in a text as plain characters,
#   so that text of users or of a data set can neither end a sequence nor stand for an image.
# What happens: it only stops the search for added tokens. A SentencePiece (Unigram) vocabulary holds "</s>" and "<pad>" as
#   pieces of score 0, the best there is, and a word-level one holds them as words, so the model gives their ids all the same.
#   With BPE and WordPiece it works. A blank behind the first character ("< /s>") works with all.
# Source: PreTrainedTokenizerFast._encode_plus sets encode_special_tokens of tokenizers; models.Unigram then finds the piece.
# Who is hurt: training data with "</s>" in answers or captions: the text ends there, though the option was set.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
from transformers import T5Tokenizer

pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
tokenizer = T5Tokenizer(vocab=pieces + [(letter, -4.0) for letter in "redcil</s>"], extra_ids=0)
end = tokenizer.eos_token_id
seen = {}
for name, text, options in (
    ("as it stands", "red </s> circle", {}),
    ("split_special_tokens=True", "red </s> circle", {"split_special_tokens": True}),
    ("with a blank", "red < /s> circle", {}),
):
    ids = tokenizer(text, add_special_tokens=False, **options).input_ids
    seen[name] = end in ids
    print(f"{name}: {tokenizer.convert_ids_to_tokens(ids)}; the end token {end} is among them: {end in ids}")
assert seen == {"as it stands": True, "split_special_tokens=True": True, "with a blank": False}
PY
