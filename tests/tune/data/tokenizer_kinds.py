"""Tokenizers of the kinds that bases have, made small: what each does with spaces, words and control tokens."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the hat is here", "she said the rest", "they see this: is it", "the tar; its ash\nthat is, this"] * 4
LETTERS = sorted(set("".join(CORPUS)) | set(" \n.,:;'</>|[]") | set("adeghinorstz"))
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTROL = [*NAMES.values(), "<|user|>", "<|end|>", "<|word|>"]
"""`<|end|>` takes blanks behind it, `<|word|>` those before it."""


def _sentencepiece(scheme):
    """BPE on words that begin with their space, as newer Llama-like tokenizers have it."""
    tokenizer = Tokenizer(_pieces())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.ByteFallback(), decoders.Fuse()] + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *steps])
    return tokenizer


def _pieces():
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learned = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in learned)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [(one[:cut], one[cut:]) for one, cut in _made_of(vocabulary, [piece for piece, _ in learned])]
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _made_of(vocabulary, pieces):
    """Each piece and where it can be cut into two that are there as well."""
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary:
                yield piece, cut
                break


def _llama_2():
    """A space before each stretch of text, by a normalizer, and no words: the description that Llama 2 came with."""
    tokenizer = Tokenizer(_pieces())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _byte_level(*, prefix=False, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram():
    """Scores by length; control tokens stand among the pieces, as sentencepiece writes them."""
    words = [f"▁{word}" for line in CORPUS for word in line.split()]
    pieces = sorted({word[:end] for word in words for end in range(2, len(word) + 1)} | {"is", "th", "he", "st"})
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    vocabulary += [(letter, -5.0 - place / 100) for place, letter in enumerate(LETTERS) if letter != " "]
    vocabulary += [(piece, -4.0 - place / 100) for place, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _word_piece():
    words = {word for line in CORPUS for word in line.split()}
    names = ["<unk>", "<s>", "</s>", *LETTERS, *(f"##{letter}" for letter in LETTERS), *sorted(words)]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _composing():
    """Letters are composed, made small, and blanks are drawn together before words are made."""
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
    return _byte_level(normalizer=normalizers.Sequence(steps))


def _stripping():
    """No text begins or ends with a blank."""
    return _byte_level(normalizer=normalizers.Strip())


KINDS = {
    "byte-level": _byte_level,
    "byte-level, space before": lambda: _byte_level(prefix=True),
    "sentencepiece, space before each text": lambda: _sentencepiece("always"),
    "sentencepiece, space before the first": lambda: _sentencepiece("first"),
    "sentencepiece, no space": lambda: _sentencepiece("never"),
    "llama-2": _llama_2,
    "unigram": _unigram,
    "word-piece": _word_piece,
    "composing": _composing,
    "stripping": _stripping,
}
LOSSLESS = ("byte-level", "sentencepiece, no space", "llama-2")
"""Of any text."""
REFUSES = ("word-piece", "stripping")
"""Not every text can be put together again, wherever it is cut."""


def tokenizer_of(kind):
    """With control tokens, and a BOS before each text."""
    tokenizer = KINDS[kind]()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **NAMES)
    made.add_tokens(
        [
            AddedToken("<|user|>", special=True, normalized=False),
            AddedToken("<|end|>", special=True, normalized=False, rstrip=True),
            AddedToken("<|word|>", special=True, normalized=False, lstrip=True),
        ],
        special_tokens=True,
    )
    return made
