#!/usr/bin/env bash
# transformers 5: BERT's tokenizer decodes "don't" as "don ' t", and the old clean-up, asked for, restores a part only.
#
# A good guess: decode(encode(text)) of an uncased BERT gives the lower-cased text, as it nearly did for years ("don't");
#   clean_up_tokenization_spaces=True gives the old behaviour back.
# What happens: pieces are joined by spaces around every apostrophe, hyphen, colon and currency sign; only full stops and
#   commas join the word before them. With clean_up_tokenization_spaces=True contractions come back, "10:30", "$5.00" and
#   "t-shirt" do not.
# Source: the decoder of tokenizers.decoders.WordPiece and PreTrainedTokenizerBase.clean_up_tokenization_spaces, now False.
# Who is hurt: generative models on BERT's vocabulary (BLIP, BERT decoders): exact-match scores count a right answer as wrong.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import pathlib
from transformers import BertTokenizer

words = "[PAD] [UNK] [CLS] [SEP] [MASK] don ' t 10 : 30 a . m $ 5 00 - shirt".split()
pathlib.Path("vocab.txt").write_text("\n".join(words) + "\n")
tokenizer = BertTokenizer.from_pretrained(".")
decode = lambda text, **options: tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True, **options)
seen = {text: (decode(text), decode(text, clean_up_tokenization_spaces=True))
        for text in ("don't", "10:30 a.m.", "$5.00", "t-shirt")}
for text, (plain, cleaned) in seen.items():
    print(f"{text!r}: decoded {plain!r}, with clean_up_tokenization_spaces=True {cleaned!r}")
assert all(plain != text for text, (plain, _) in seen.items())
assert [text for text, (_, cleaned) in seen.items() if cleaned == text] == ["don't"]
PY
