"""Trains the judges: `python -m escd.pretrain.judges`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.utils import save_image

from ..data.names import NONE, PATTERNS, SHAPES, SIZE
from ..data.random import CounterRNG
from ..data.world import World
from ..ending import run_command
from ..evaluation.answers import IGNORED, accuracies, still_clear, targets_of
from ..evaluation.judges import HEADS, Judge, Judges, judgement
from ..paths import WEIGHTS
from .loop import LoopConfig, train


def loss_of(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum of each head's cross-entropy over the images with a clear answer."""
    total = logits["shape"].new_zeros(())
    for name in ("shape", "pattern", "background"):
        if (targets[name] != IGNORED).any():
            total = total + F.cross_entropy(logits[name].float(), targets[name], ignore_index=IGNORED)
    clear = (targets["colours"] >= 0).float()
    each = F.binary_cross_entropy_with_logits(
        logits["colours"].float(), targets["colours"].clamp(min=0), reduction="none"
    )
    return total + 4 * (each * clear).sum() / clear.sum().clamp(min=1)


class JudgedLoss(nn.Module):
    """The judge with its loss, for `escd.pretrain.loop`."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge()

    def forward(self, batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        logits, figure = self.judge.read(images)
        right = accuracies(judgement(logits), targets)
        off = F.binary_cross_entropy_with_logits(figure, targets["figure"])
        logs = {name: torch.tensor(score) for name, score in right.items()}
        return loss_of(logits, targets) + 4 * off, logs | {"figure": off.detach()}


class JudgeStage:
    """Trains the judge on images, half of them reconstructed by the autoencoder in the folder `vae`."""

    name = "judges"
    # about a quarter of an hour on one thread
    loop = LoopConfig(
        images=128_000, batch_size=64, learning_rate=4e-3, warmup=0.02, decay=0.7, ema_decay=0.98, seed=15
    )
    decoded = 0.5  # share of reconstructed training images
    reuse = 3  # uses of an image, each degraded differently: rendering takes longer than a training step
    bank, begun = 12_288, 1_024  # images to draw from, at most and at first

    def __init__(self, device: torch.device, vae: Path) -> None:
        torch.manual_seed(self.loop.seed)  # differs from the seeds of the other stages
        self.module = JudgedLoss()
        self.heavy: list[nn.Module] = []
        self.world = World(seed=15, named_shapes=0.5, named_appearances=0.5, device=device)
        self.vae = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device).eval()
        self.vae.requires_grad_(False)
        self.device = device
        self.painted = 0  # images rendered so far
        self.images = torch.empty(self.bank, 3, SIZE, SIZE, dtype=torch.half, device=device)
        self.targets: dict[str, Tensor] = {}
        self.fixed: dict[str, dict[str, tuple[Tensor, dict[str, Tensor]]]] = {}

    def load(self, folder: Path) -> None:
        """Take an exported judge."""
        self.module.judge.load_state_dict(
            Judge.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        )

    def state_dict(self) -> dict[str, Any]:
        """The bank of images with their targets."""
        filled = min(self.painted, self.bank)
        targets = {name: target[:filled].clone() for name, target in self.targets.items()}
        return {"painted": self.painted, "images": self.images[:filled].clone(), "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.painted, filled = state["painted"], len(state["images"])
        self.images[:filled] = state["images"].to(self.device)
        for name, target in state["targets"].items():
            self.targets[name] = torch.empty(
                self.bank, *target.shape[1:], dtype=target.dtype, device=self.device
            )
            self.targets[name][:filled] = target.to(self.device)

    def batch(self, first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        fresh = max(1, count // self.reuse) if self.painted else self.begun
        self._paint(torch.arange(first, first + fresh, device=self.device))
        draws = CounterRNG(self.world.seed, torch.arange(first, first + count, device=self.device))
        rows = draws.integer("row", 0, min(self.painted, self.bank))
        targets = {name: target[rows] for name, target in self.targets.items()}
        images = spoil(self.images[rows].float(), draws)
        return images, still_clear(images, targets)

    def _paint(self, index: Tensor) -> None:
        """Put the images with these numbers into the bank, over the oldest ones."""
        pictures, draws = self.world.batch(index), CounterRNG(self.world.seed, index)
        targets, images = targets_of(pictures), pictures.image.clone()
        empty = (draws.uniform("empty") < 0.04).nonzero()[:, 0]
        if len(empty):
            images[empty] = self.world.backgrounds(index[empty])[0] * 2 - 1
            targets["shape"][empty], targets["pattern"][empty] = len(SHAPES), len(PATTERNS)
            targets["colours"][empty], targets["figure"][empty] = -1, 0
        through = (draws.uniform("through") < self.decoded).nonzero()[:, 0]
        if len(through):
            images[through] = self.reconstruct(images[through], draws[through])
        if not self.targets:
            self.targets = {n: t.new_empty(self.bank, *t.shape[1:]) for n, t in targets.items()}
        rows = (self.painted + torch.arange(len(images), device=self.device)) % self.bank
        self.images[rows] = images.half()
        for name, target in targets.items():
            self.targets[name][rows] = target
        self.painted += len(images)

    def reconstruct(self, images: Tensor, draws: CounterRNG | None = None) -> Tensor:
        """Reconstructed images; with draws, latents get noise of up to 17 %, as sampled ones have."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            latents = self.vae.encode(images).latent_dist.mean
            if draws is not None:
                off = torch.randn_like(latents) * latents.std()
                latents = latents + off * draws.uniform("off", 1, 1, 1, high=0.17)
            return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def held_out(self, split: str, count: int = 1024) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """Fixed held-out images, rendered and decoded (reconstructed), with their targets."""
        if split not in self.fixed:
            unseen = World(
                seed=9015, split=split, named_shapes=0.5, named_appearances=0.5, device=self.device
            )
            parts = [unseen.batch(range(first, first + 128)) for first in range(0, count, 128)]
            targets = [targets_of(part) for part in parts]
            rendered = torch.cat([part.image for part in parts])
            decoded = torch.cat([self.reconstruct(part.image) for part in parts])
            clear = {name: torch.cat([target[name] for target in targets]) for name in targets[0]}
            self.fixed[split] = {
                "rendered": (rendered, clear),
                "decoded": (decoded, still_clear(decoded, clear)),
            }
        return self.fixed[split]

    def evaluate(self) -> dict[str, float]:
        judges, scores = Judges(self.module.judge), {}
        for split in ("train", "heldout"):
            for kind, (images, targets) in self.held_out(split).items():
                right = accuracies(judges(images), targets)
                scores |= {f"{name}, {split}, {kind}": round(right[name], 4) for name in right}
        return scores

    def grid(self, path: Path) -> None:
        """Reconstructed images on which the judge is wrong."""
        decoded, targets = self.held_out("train")["decoded"]
        answers = Judges(self.module.judge)(decoded)
        wrong = torch.zeros(len(decoded), dtype=torch.bool, device=decoded.device)
        for name in ("shape", "pattern", "background"):
            answer = getattr(answers, name)
            answer = torch.where(answer == NONE, HEADS[name] - 1, answer)
            wrong |= (answer != targets[name]) & (targets[name] != IGNORED)
        if wrong.any():
            save_image(decoded[wrong][:64] / 2 + 0.5, path, nrow=16)

    def export(self, folder: Path) -> None:
        # ModelMixin.half() would change the network being trained.
        copy = Judge(**{k: v for k, v in self.module.judge.config.items() if not k.startswith("_")})
        copy.load_state_dict(self.module.judge.state_dict())
        copy.half().save_pretrained(folder)


def spoil(images: Tensor, draws: CounterRNG) -> Tensor:
    """Degrade images as an autoencoder and a sampler may, without changing their content.

    Half of them are blurred to between 60 and 100 % of the resolution; half get a colour cast and a gain of a
    few per cent, and smooth noise.
    """
    out = images.clone()
    kind = draws.integer("sharpness", 0, 8)
    for k, side in enumerate((40, 46, 52, 58)):
        rows = (kind == k).nonzero()[:, 0]
        if len(rows):
            small = F.interpolate(
                images[rows], (side, side), mode="bilinear", antialias=True, align_corners=False
            )
            out[rows] = F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)
    spoiled = (draws.uniform("spoiled") < 0.5).to(images)[:, None, None, None]
    gain = 1 + spoiled * draws.uniform("gain", 1, 1, 1, low=-0.06, high=0.06)
    cast = spoiled * draws.uniform("cast", 3, 1, 1, low=-0.05, high=0.05)
    soft = F.avg_pool2d(torch.randn_like(out), 3, 1, 1) * draws.uniform("noise", 1, 1, 1, high=0.12) * spoiled
    return (out * gain + cast + soft).clamp(-1, 1)


def main(argv: list[str] | None = None) -> None:
    """Train the judges and print their validation."""
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain.judges", description=main.__doc__)
    parser.add_argument(
        "--vae",
        type=Path,
        default=WEIGHTS / "mini" / "vae",
        help="the autoencoder of the reconstructed images (default: mini's)",
    )
    parser.add_argument(
        "--images", type=int, help=f"training images in all (default: {JudgeStage.loop.images})"
    )
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument(
        "--further", action="store_true", help="start from the exported weights instead of from random ones"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS / "judges",
        help="where to export (default: the package's own)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.weights.mkdir(parents=True, exist_ok=True)
    record = train(
        lambda device: JudgeStage(device, arguments.vae),
        weights=arguments.weights,
        images=arguments.images,
        further=arguments.further,
        learning_rate=arguments.learning_rate,
    )
    for name, score in record["scores"][-1].items():
        print(f"{name:>28}  {score:.4f}" if isinstance(score, float) else f"{name:>28}  {score}")


if __name__ == "__main__":
    run_command(main)
