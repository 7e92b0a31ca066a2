"""A tokenizer of each family, trained on given texts, with the normaliser and the decoder of its real counterpart."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def word_piece(texts: Iterable[str], cased: bool = False) -> PreTrainedTokenizerFast:
    """As of BERT, whose decoder is the one that transformers makes."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _trained(made, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL), texts)


def word_level(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Whole words and runs of marks, without a decoder."""
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(made, trainers.WordLevelTrainer(special_tokens=SPECIAL), texts)


def byte_pairs(texts: Iterable[str], clean_up: bool = False) -> PreTrainedTokenizerFast:
    """As of GPT-2 and BART; with the clean-up of spaces that many saved tokenizers ask for."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return _trained(made, trainer, texts, clean_up_tokenization_spaces=clean_up)


def sentence_piece(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As of T5: compatibility characters become plain ones, and runs of spaces one."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _trained(made, trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="[UNK]"), texts)


FAMILIES = {
    "uncased WordPiece": word_piece,
    "cased WordPiece": lambda texts: word_piece(texts, cased=True),
    "words": word_level,
    "byte pairs": byte_pairs,
    "byte pairs with clean-up": lambda texts: byte_pairs(texts, clean_up=True),
    "SentencePiece": sentence_piece,
}


def _trained(made: Tokenizer, trainer: trainers.Trainer, texts: Iterable[str], **options) -> PreTrainedTokenizerFast:
    made.train_from_iterator(texts, trainer)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **options)
