"""Stage 3 of pretraining: the image tower, open_clip's vision transformer, with the text tower frozen.

The loss is CLIP's (Radford et al. 2021), with the frozen text tower of stage 2 (as locked-image tuning, Zhai
et al. 2022, with the towers exchanged). Two auxiliary heads have contrastive losses over cross-image pairs:
images that share only their shape, and images that share only their appearance. Captions have no word for
most outlines and materials; these pairs put them into the CLS token. The heads are not exported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..backbone.folder import load_text_encoder
from ..backbone.image_tower import ImageTower
from ..data.captions import draw_caption
from ..data.world import World
from .loop import LoopConfig
from .vocabulary import CONTEXT

WIDTH = 192
MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": 64,
        "patch_size": 8,
        "width": WIDTH,
        "layers": 5,
        "head_width": 48,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": CONTEXT, "width": WIDTH, "heads": 4, "layers": 4},
}


def text_tower(clip: open_clip.CLIP, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of an open_clip model as transformers' class; the same outputs to 1e-5."""
    cfg = MODEL["text_cfg"]
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip.vocab_size,
            hidden_size=cfg["width"],
            intermediate_size=4 * cfg["width"],
            projection_dim=MODEL["embed_dim"],
            num_hidden_layers=cfg["layers"],
            num_attention_heads=cfg["heads"],
            max_position_embeddings=cfg["context_length"],
            hidden_act="gelu",  # open_clip's activation, not the class's default
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    source, target = clip.state_dict(), model.state_dict()
    # transformers 5 dropped the "text_model." prefix inside the class; 4 has it.
    prefix = "text_model." if any(k.startswith("text_model.") for k in target) else ""
    out = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    for k in range(cfg["layers"]):
        old, new = f"transformer.resblocks.{k}.", f"encoder.layers.{k}."
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", source[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{new}self_attn.{part}_proj.{kind}"] = rows
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                out[f"{new}{b}.{kind}"] = source[f"{old}{a}.{kind}"]
    missing = {k for k in target if "position_ids" not in k} - {prefix + k for k in out}
    if missing:
        raise RuntimeError(f"no source for {sorted(missing)}")
    model.load_state_dict({prefix + k: v for k, v in out.items()}, strict=False)
    return model.eval()


def load_text_tower(folder: Path, device: torch.device) -> CLIPTextModel:
    """The frozen text tower of an exported backbone, in float32."""
    with torch.random.fork_rng(devices=()):  # the initial weights that are replaced must not cost draws
        text = load_text_encoder(folder / "text_encoder", torch.float32)
    return text.to(device).eval().requires_grad_(False)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save for all versions of transformers: tokenizer.json for 5, vocab.json and merges.txt for 4."""
    with TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        shutil.copytree(name, folder, dirs_exist_ok=True)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def read_captions(tokenizer: CLIPTokenizer, text: CLIPTextModel, captions: list[str]) -> Tensor:
    """Last hidden states (N, L, WIDTH) of a frozen text tower, in float32: the UNet's text conditioning."""
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad(), torch.autocast(text.device.type, torch.bfloat16):
        return text(ids.to(text.device))[0].float()


class TowerLoss(nn.Module):
    """CLIP's loss over (image, caption), and the two cross-image losses over (image, partner)."""

    def __init__(self) -> None:
        super().__init__()
        # open_clip always builds both towers: this is the smallest text tower it accepts.
        unused = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
        self.clip = open_clip.CLIP(MODEL["embed_dim"], open_clip.CLIPVisionCfg(**MODEL["vision_cfg"]), unused)
        for name, parameter in self.clip.named_parameters():
            parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
        for name, value in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)
        self.read = nn.Linear(WIDTH, MODEL["embed_dim"])
        self.heads = nn.ModuleDict({"shape": nn.Linear(WIDTH, 96), "appearance": nn.Linear(WIDTH, 96)})

    def cls_token(self, images: Tensor) -> Tensor:
        """The CLS token before its projection (B, WIDTH), as stage 1 of the method reads it."""
        visual = self.clip.visual
        projection, visual.proj = visual.proj, None
        try:
            # `forward` is not compiled: an evaluation's batch size would compile the tower again
            return (visual if self.training else visual.forward)((images / 2 + 0.5 - self.mean) / self.std)
        finally:
            visual.proj = projection

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        n = len(batch["text"])
        cls = self.cls_token(batch["images"])  # (2N, WIDTH): N images, N partners
        image = F.normalize((cls[:n] @ self.clip.visual.proj).float(), dim=-1)
        text = F.normalize(self.read(batch["text"]).float(), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        # Images with the same caption are all correct.
        target = batch["same"] / batch["same"].sum(1, keepdim=True)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        logs, loss = {"clip": contrastive}, contrastive
        for k, (name, head) in enumerate(self.heads.items()):
            # The first half of the batch has partners of the same shape, the second of the same appearance.
            rows = torch.arange(k * n // 2, (k + 1) * n // 2, device=cls.device)
            a, b = (F.normalize(head(cls[r]).float(), dim=-1) for r in (rows, rows + n))
            pair = a @ b.T / 0.07
            logs[name] = F.cross_entropy(pair, torch.arange(len(rows), device=cls.device))
            loss = loss + 0.5 * logs[name]
        return loss, logs


class TowerStage:
    """Trains the image tower against the text tower in `folder`."""

    name = "towers"
    loop = LoopConfig(images=120_000, batch_size=128, learning_rate=1e-3, decay=0.7, weight_decay=0.05)

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text = load_text_tower(folder, device)
        torch.manual_seed(12)
        self.module = TowerLoss()
        self.heavy = [self.module.clip.visual]
        self.world = World(seed=12, device=device)
        self.fixed = self._batch(World(seed=9012, device=device), 0, 256)

    def load(self, folder: Path) -> None:
        """Take an exported image tower; the heads and CLIP's projection start anew."""
        tower = ImageTower.from_pretrained(folder / "image_tower", torch_dtype=torch.float32)
        self.module.clip.visual.load_state_dict(tower.visual.state_dict(), strict=False)  # all but `proj`

    def _batch(self, world: World, first: int, count: int) -> dict[str, Tensor]:
        index = torch.arange(first, first + count)
        other = index + (1 << 40)  # never reached by `first`
        half = count // 2
        shape, appearance = torch.cat([index[:half], other[half:]]), torch.cat([other[:half], index[half:]])
        b = world.batch(index)
        partner = world.batch(other, shape=shape, appearance=appearance)
        u = world._draws("pick", index).uniform("u").tolist()
        # Full captions only: a partial one fits too many images.
        captions = [draw_caption(c, 0.8 * v) for c, v in zip(b.captions, u, strict=True)]
        end = read_captions(self.tokenizer, self.text, captions)[:, -1]  # padded with the end token
        same = torch.tensor([[one == other for other in captions] for one in captions]).to(end)
        return {"images": torch.cat([b.image, partner.image]), "text": end, "same": same}

    def batch(self, first: int, count: int) -> dict[str, Tensor]:
        return self._batch(self.world, first, count)

    def evaluate(self) -> dict[str, float]:
        _, logs = self.module(self.fixed)
        return {k: round(float(v), 4) for k, v in logs.items()}

    def grid(self, path: Path) -> None:
        save_image(self.fixed["images"][:64] * 0.5 + 0.5, path, nrow=16)

    def export(self, folder: Path) -> None:
        tower: ModelMixin = ImageTower.from_open_clip(self.module.clip, MODEL)
        tower.half().save_pretrained(folder / "image_tower")
