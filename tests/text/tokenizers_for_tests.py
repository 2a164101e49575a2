"""Small tokenizers of every decoder kind, trained in a moment on a text with many scripts."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. A stitch in time saves nine.",
    "def step(self, plan): return [row for row in plan.rows if row.samples]",
    "Größe, naïve café, über, Ångström — “quotes” … ",
    "你好，世界。 日本語のテキスト。 한국어 문장입니다.",
    "emoji 👩‍👩‍👧‍👦 🎉🎉 🇩🇪 and combining é ñ a\u0308\u0323",
    "  indented    text\n\n\twith tabs  ",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("ünïcode", special=False)])
    return tokenizer


@cache
def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's arrangement: byte fallback, and one leading space stripped from the whole text."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *bytes_])}
    for character in "▁abcdefghijklmnopqrstuvwxyzTé,.":
        vocab.setdefault(character, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("q", "u")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def word_suffix() -> Tokenizer:
    """The original BPE's `</w>`: its decoder looks at what comes next, so no table fits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def no_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "alpha": 1, "beta": 2, "γ": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


LINEAR = {
    "byte_level": byte_level,
    "sentencepiece_bpe": sentencepiece_bpe,
    "metaspace": metaspace,
    "no_decoder": no_decoder,
}
ALL = {**LINEAR, "word_suffix": word_suffix}
