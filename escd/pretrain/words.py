"""Stage 2 of pretraining: the text tower learns to classify captions.

Trained with a contrastive loss alone, a small text tower hardly separates the names of shapes
(docs/notes/2026-11-25-towers.md). Each caption is its own label: which shape, pattern, colours and background
it names. The tower predicts these at its end token, which the image tower is then trained against (`towers`),
and each token at its own position. The heads are not exported.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from ..backbone.folder import save_text_encoder
from ..data.captions import captions_of, draw_caption
from ..data.names import BACKGROUNDS, COLOURS, PATTERNS, SHAPES
from ..data.random import CounterRNG
from .loop import LoopConfig
from .towers import MODEL, WIDTH, save_tokenizer, text_tower
from .vocabulary import make_tokenizer

GROUNDS = (*BACKGROUNDS, "plain", "gradient", "cluttered")
FULL = 0.8  # below this, `draw_caption` picks a form that names everything


def draw_captions(draws: CounterRNG) -> tuple[list[str], dict[str, Tensor]]:
    """A caption for each of N draws, and its labels.

    "shape" (N,) and "pattern" (N,), the last class being "no name"; "ground" (N,) index into GROUNDS;
    "colours" (N, 8) bool; "full" (N,) bool: whether the caption names all of these.
    """
    shape = draws.choose("shape", [1.0] * len(SHAPES) + [6.0])
    pattern = draws.choose("pattern", [1.0] * len(PATTERNS) + [3.0])
    ground = draws.integer("ground", 0, len(GROUNDS))
    first = draws.integer("first", 0, len(COLOURS))
    second = (first + draws.integer("second", 1, len(COLOURS))) % len(COLOURS)
    single = (draws.uniform("single") < 0.25) | (pattern == PATTERNS.index("solid"))
    decoy = draws.choose("decoy", [1.0] * len(SHAPES) + [6.0])
    u = draws.uniform("form")
    named = pattern < len(PATTERNS)
    colours = torch.zeros(len(draws), len(COLOURS), dtype=torch.bool)
    rows = torch.arange(len(draws))
    colours[rows, first] = named
    colours[rows, second] |= named & ~single
    names = (*SHAPES, "shape")
    captions = []
    for k in range(len(draws)):
        tones = [COLOURS[first[k]]] if single[k] else [COLOURS[first[k]], COLOURS[second[k]]]
        look = PATTERNS[pattern[k]] if named[k] else None
        forms = captions_of(names[shape[k]], look, tones if look else [], GROUNDS[ground[k]], names[decoy[k]])
        captions.append(draw_caption(forms, float(u[k])))
    labels = {"shape": shape, "pattern": pattern, "ground": ground, "colours": colours, "full": u < FULL}
    return captions, labels


class WordLoss(nn.Module):
    """Classification of full captions at the end token, and of each token at its own position."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.clip = open_clip.CLIP(
            MODEL["embed_dim"],
            open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]),
            open_clip.CLIPTextCfg(vocab_size=vocabulary, **MODEL["text_cfg"]),
        )
        self.clip.visual = None  # this stage uses no images
        for unused in (self.clip.text_projection, self.clip.logit_scale):
            unused.requires_grad_(False)
        sizes = {"shape": len(SHAPES) + 1, "pattern": len(PATTERNS) + 1, "ground": len(GROUNDS)}
        sizes |= {"colours": len(COLOURS), "own": vocabulary}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, size) for name, size in sizes.items()})

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states (N, L, WIDTH) of token ids (N, L), as the UNet reads them."""
        clip = self.clip
        x = clip.token_embedding(tokens) + clip.positional_embedding
        return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, full = batch["tokens"], batch["full"]
        hidden = self.hidden(tokens)
        end = hidden[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)][full].float()
        logs = {
            name: F.cross_entropy(self.heads[name](end), batch[name][full])
            for name in ("shape", "pattern", "ground")
        }
        labels = batch["colours"][full].float()
        logs["colours"] = F.binary_cross_entropy_with_logits(self.heads["colours"](end), labels)
        real = torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(-1, keepdim=True)
        logs["own"] = F.cross_entropy(self.heads["own"](hidden[real]).float(), tokens[real])
        return sum(logs.values()), logs


class WordStage:
    """Trains the text tower and its vocabulary from captions."""

    name = "words"
    loop = LoopConfig(images=100_000, batch_size=256, learning_rate=1e-3, decay=0.7)  # of captions

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.tokenizer = make_tokenizer()
        torch.manual_seed(15)
        self.module = WordLoss(len(self.tokenizer))
        self.heavy: list[torch.nn.Module] = []
        self.device = device
        self.fixed = self._batch(9015, 0, 512)

    def _batch(self, seed: int, first: int, count: int) -> dict[str, Tensor]:
        captions, labels = draw_captions(CounterRNG(seed, torch.arange(first, first + count)))
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {name: value.to(self.device) for name, value in (labels | {"tokens": ids}).items()}

    def batch(self, first: int, count: int) -> dict[str, Tensor]:
        return self._batch(15, first, count)

    def evaluate(self) -> dict[str, float]:
        """Losses on held-out captions, and the spread of the names of each kind in the end token."""
        scores = {name: round(float(value), 5) for name, value in self.module(self.fixed)[1].items()}
        for kind, names in (("shape", SHAPES), ("colour", COLOURS), ("background", BACKGROUNDS)):
            captions = [f"a {n} shape with solid {n} appearance on a {n} background" for n in names]
            ids = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
            end = self.module.hidden(ids.to(self.device))[:, -1]
            scores[f"apart_{kind}"] = round(float((end - end.mean(0)).norm(dim=-1).mean()), 3)
        return scores

    def grid(self, path: Path) -> None:
        """Cosine similarities of the token embeddings: a row and a column for each token."""
        table = F.normalize(self.module.clip.token_embedding.weight.float(), dim=-1)
        save_image((table @ table.T)[None] / 2 + 0.5, path)

    def export(self, folder: Path) -> None:
        save_text_encoder(text_tower(self.module.clip, self.tokenizer).half(), folder / "text_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")
