"""How a prompt with pseudo-words is read: its words, their token ids, what the text encoder makes of them.

The tokenizer and the text encoder given are never changed: pseudo-words are added to copies of the tokenizer,
and enter the text encoder in place of rows that leave its table.
"""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AddedToken

from .skeleton import hooked, replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import CLIPTextModel, CLIPTokenizerFast

PSEUDO_WORD = re.compile(r"\*[^\W\d_]\w*")
# Whatever a pseudo-word is glued to in a prompt; `\w` is what the tokenizer's single_word looks at.
_STARRED = re.compile(r"[\w*]*\*[^\W\d_][\w*]*")
# Looks like an asterisk and is none: full-width, small, low, mathematical, Arabic, or an ornament.
_NO_ASTERISKS = "\uff0a\ufe61\u204e\u2217\u22c6\u066d\u2055\u2731-\u2733\u273a-\u273d"
_LOOKALIKE = re.compile(rf"[{_NO_ASTERISKS}]([^\W\d_]\w*)")

# A tokenizer keeps its padding and its cutting off as a state: one reads at a time, and on copies.
_READING = threading.Lock()
_copies: WeakKeyDictionary = WeakKeyDictionary()


def starred_words(prompt: str) -> list[str]:
    """Whatever in `prompt` looks like a pseudo-word, with all that is glued to it, in lower case."""
    return [match.group().lower() for match in _STARRED.finditer(prompt)]


def check_prompt(tokenizer: CLIPTokenizerFast, prompt: str, loaded_tokens: Iterable[str]) -> None:
    """Raise ValueError when a pseudo-word of `prompt` is not loaded, not standing alone, or cut off.

    Asterisks inside or around other words ("M*A*S*H", "**red**") are text, unless one begins the name of a
    loaded pseudo-word. Warns of a character before such a name that only looks like an asterisk.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"a prompt is a string, not {type(prompt).__name__}")
    loaded = sorted(loaded_tokens)
    for slip in _LOOKALIKE.finditer(prompt):
        if (token := f"*{slip.group(1).lower()}") in loaded:
            warnings.warn(
                f"{slip.group()!r} in the prompt begins with U+{ord(slip.group()[0]):04X}, which only looks "
                f"like an asterisk: it is read as text. For the pseudo-word write {token!r}",
                stacklevel=3,
            )
    found = starred_words(prompt)
    for word in found:
        if word in loaded or word in tokenizer.get_added_vocab():
            continue
        glued = not PSEUDO_WORD.fullmatch(word)
        if glued and not set(PSEUDO_WORD.findall(word)) & set(loaded):
            continue
        if glued:
            raise ValueError(
                f"{word!r} in the prompt: a pseudo-word is an asterisk and a name and must stand alone, "
                "as in 'a *m shape'"
            )
        begun = [token for token in loaded if word.startswith(token)]
        hint = f"; {begun[0]!r} must stand alone, not begin a word" if begun else ""
        raise ValueError(
            f"the prompt has the pseudo-word {word!r}, but no customization that brings it is loaded "
            f"(loaded: {', '.join(loaded) or 'none'}){hint}"
        )
    cut = cut_off(tokenizer, prompt, loaded) if set(found) & set(loaded) else ""
    if behind := [word for word in starred_words(cut) if word in loaded]:
        raise ValueError(
            f"the text encoder reads {tokenizer.model_max_length} tokens of the prompt, "
            f"and {behind[0]!r} stands behind them"
        )


def copy_of(tokenizer: CLIPTokenizerFast) -> CLIPTokenizerFast:
    """A tokenizer of the same words, which can learn others."""
    twin = copy.deepcopy(tokenizer)
    if hasattr(twin, "_wrap_decode_method_backend_tokenizer"):
        twin._wrap_decode_method_backend_tokenizer()  # transformers' mending of spaces is lost in a copy
    return twin


@contextmanager
def reader(tokenizer: CLIPTokenizerFast, tokens: Iterable[str] = ()) -> Iterator[CLIPTokenizerFast]:
    """A copy of the tokenizer that reads each of `tokens` as one token."""
    key = (len(tokenizer), *sorted(tokens))
    with _READING:
        copies = _copies.setdefault(tokenizer, {})
        if key not in copies:
            if any(known[0] != len(tokenizer) for known in copies):
                copies.clear()  # it has learnt words since
            copies[key] = copy_of(tokenizer)
            # Without single_word, "*man" would become "*m" and "an".
            copies[key].add_tokens([AddedToken(t, single_word=True, normalized=True) for t in key[1:]])
        yield copies[key]


def cut_off(tokenizer: CLIPTokenizerFast, prompt: str, tokens: Iterable[str] = ()) -> str:
    """What of `prompt` lies beyond the tokens the text encoder reads; mostly nothing."""
    with reader(tokenizer, tokens) as reads:
        ids = reads(prompt, verbose=False).input_ids
        return reads.decode(ids[reads.model_max_length - 1 : -1])


def word_id(tokenizer: CLIPTokenizerFast, word: str) -> int | None:
    """The token id of `word`; None for what is not one token of the vocabulary."""
    with reader(tokenizer) as reads:
        ids = reads(word, add_special_tokens=False).input_ids
        return ids[0] if len(ids) == 1 and ids[0] not in reads.all_special_ids else None


def rare_word(tokenizer: CLIPTokenizerFast) -> str:
    """A word without a meaning of its own: "sks", or else the vocabulary's last that is read as one token.

    A vocabulary is in the order of its merges, the rarest last.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    words = (entry.removesuffix("</w>") for entry, _ in vocabulary if entry.endswith("</w>"))
    return next(word for word in ("sks", *words) if word.isalpha() and word_id(tokenizer, word) is not None)


def token_ids(tokenizer: CLIPTokenizerFast, prompts: list[str], tokens: Collection[str] = ()) -> Tensor:
    """Token ids (B, L), padded and cut to the encoder's length; -1 is the first of `tokens`, -2 the next."""
    with reader(tokenizer, tokens) as reads:
        ids = reads(
            prompts,
            padding="max_length",
            max_length=reads.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for k, token in enumerate(tokens):
            ids[ids == reads.convert_tokens_to_ids(token)] = -1 - k
    return ids


def encode_ids(
    text_encoder: CLIPTextModel, ids: Tensor, embeddings: Sequence[Tensor] = (), clip_skip: int | None = None
) -> Tensor:
    """Text conditioning (B, L, D) of token ids (B, L) as `token_ids` gives them, on the encoder's device.

    embeddings: those of the pseudo-words -1, -2, ..., (D,) for all prompts or (B, D), one for each; gradients
    flow into them. clip_skip: how many of the encoder's last layers are left out.
    """
    if clip_skip:
        text_encoder = _without_last_layers(text_encoder, clip_skip)
    if not len(embeddings):
        return text_encoder(ids)[0]
    replacements = [
        ((ids == -1 - k)[..., None], v if v.ndim == 1 else v[:, None, :]) for k, v in enumerate(embeddings)
    ]

    def replace(_module: nn.Module, _inputs: tuple, rows: Tensor) -> Tensor:
        for here, v in replacements:
            rows = torch.where(here.to(rows.device), v.to(rows), rows)
        return rows

    # CLIPTextModel takes no inputs_embeds and its table has no row for a pseudo-word: any row is looked up in
    # its place, and replaced as it leaves the table.
    return hooked(text_encoder, table_of(text_encoder), replace)(ids.clamp(min=0))[0]


def table_of(text_encoder: CLIPTextModel) -> str:
    """The path of the text encoder's table of tokens."""
    table = text_encoder.get_input_embeddings()
    return next(path for path, module in text_encoder.named_modules() if module is table)


def _without_last_layers(text_encoder: CLIPTextModel, count: int) -> CLIPTextModel:
    path, layers = next(
        (path, module)
        for path, module in text_encoder.named_modules()
        if path.endswith("encoder.layers") and isinstance(module, nn.ModuleList)
    )
    return replaced(text_encoder, path, layers[: len(layers) - count])


def encode(
    tokenizer: CLIPTokenizerFast,
    text_encoder: CLIPTextModel,
    prompts: Iterable[str] | str,
    pseudo_words: Mapping[str, Tensor] | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Text conditioning tau(c) (B, L, D) of `prompts`; the one place where pseudo-words enter.

    `pseudo_words` maps a token ("*m") to its embedding, as in `encode_ids`. Raises ValueError for a
    pseudo-word that is missing here, split or cut off (`check_prompt`).
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pseudo_words = dict(pseudo_words or {})
    for prompt in prompts:
        check_prompt(tokenizer, prompt, pseudo_words)
    ids = token_ids(tokenizer, prompts, list(pseudo_words)).to(text_encoder.device)  # (B, L)
    return encode_ids(text_encoder, ids, list(pseudo_words.values()), clip_skip)
