"""The small byte-pair vocabulary of `mini` in CLIP's own tokenizer class: its words are tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import CLIPTokenizer

from ..data.names import APPEARANCE_WORDS, BACKGROUNDS, COLOURS, PATTERNS, SHAPES

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


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until each word is one token.

    Of pairs that are equally frequent the last in the alphabet goes first: the `tokenizers` library leaves
    that to chance, and token ids would differ from one process to the next.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in pieces:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def make_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges learnt until every word of WORDS is a single token; other words fall into letters."""
    letters = sorted({c for c in "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~"})
    merges = learn_merges(WORDS)
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
