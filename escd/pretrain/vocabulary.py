"""The small byte-pair vocabulary of `mini` in CLIP's own tokenizer class: its words are tokens."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer

from ..world import APPEARANCE_WORDS, BACKGROUNDS, COLOURS, PATTERNS, SHAPES

CONTEXT = 32
START, END = "<|startoftext|>", "<|endoftext|>"
# The words the captions are made of, and some that people are likely to type.
WORDS = (
    *SHAPES,
    *PATTERNS,
    *COLOURS,
    *BACKGROUNDS,
    *APPEARANCE_WORDS,
    "shape",
    "a",
    "an",
    "and",
    "the",
    "of",
    "in",
    "on",
    "with",
    "background",
    "plain",
    "cluttered",
    "photo",
    "picture",
    "image",
    "drawing",
    "object",
    "thing",
    "color",
    "grey",
    "small",
    "large",
    "big",
    "style",
    "made",
    "from",
    "at",
    "by",
    "is",
    "it",
    "teapot",
    "cat",
    "dog",
    "horse",
    "cup",
    "chair",
)


def make_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges learnt until every word of WORDS is a single token; other words fall into letters."""
    letters = sorted({c for c in "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator([[w] for w in sorted(set(WORDS))], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokens = [*letters, *(c + "</w>" for c in letters)]
    tokens += [m for pair in merges if (m := "".join(pair)) not in tokens]
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        tokenizer = CLIPTokenizer.from_pretrained(
            folder, model_max_length=CONTEXT, pad_token=END, unk_token=END
        )
    broken = [w for w in WORDS if len(tokenizer(w, add_special_tokens=False).input_ids) != 1]
    if broken:
        raise RuntimeError(f"these words are not single tokens: {', '.join(broken)}")
    return tokenizer
