"""The training loop of every pretraining stage: resumable, distributed, logged, with averaged weights."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .. import paths
from ..backbone.devices import choose_device
from ..files import together, write_text
from ..method.step import autocast_dtype
from .optimizers import OPTIMIZERS, make_optimizer
from .state import random_state, read_state, set_random_state, write_state

RUNS = paths.RUNS / "pretrain"
EARLIER = ("images", "seconds", "environment", "scores")  # what a record keeps of an earlier training
MOST_SKIPPED = 20  # abort after this many consecutive non-finite gradients
SMOOTHING = 0.05  # weight of a step's losses in the running mean that the curve shows
CURVE_POINTS = 200


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast one stage learns."""

    # Training images in all. The learning rate is zero at this number; a resumed run may raise it.
    images: int
    # Images per step, over all processes.
    batch_size: int
    learning_rate: float
    # Shares of the images: linear learning-rate warm-up, and linear learning-rate decay to zero at the end.
    warmup: float = 0.02
    decay: float = 0.5
    weight_decay: float = 0.01
    # Averaged weights follow with rate (1 + step) ** -0.75, at most this.
    ema_decay: float = 0.9995
    seed: int = 0
    # "adamw", or "muon": Muon for the matrices and kernels that the stage names (`Stage.muon_parameters`).
    optimizer: str = "adamw"

    def rate(self, images: int) -> float:
        """Learning rate after this many images: linear warm-up, plateau, linear decay."""
        done = images / self.images
        return self.learning_rate * max(1e-3, min(1.0, done / self.warmup + 1e-3, (1 - done) / self.decay))


class Stage(Protocol):
    """What a pretraining stage gives the loop.

    Optional: `load`, the state dicts, `muon_parameters`, `facts`.
    """

    name: str
    loop: LoopConfig
    module: nn.Module  # module(batch) -> (loss, {name: scalar tensor}); trained where it requires gradients
    heavy: list[nn.Module]  # networks worth compiling; evaluation calls their `forward`, uncompiled

    def load(self, folder: Path) -> None:
        """Take exported weights, to train them further."""

    def batch(self, first: int, count: int) -> Any:
        """Training images first ... first + count - 1, ready for `module`."""

    def state_dict(self) -> dict[str, Any]:
        """What batches depend on besides their number."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def muon_parameters(self) -> list[nn.Parameter]:
        """Parameters that Muon may train: those inside a network, without its first and last layer."""

    def facts(self) -> dict[str, Any]:
        """Entries of the training record that `load` needs to train the exported weights further."""

    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged weights on a fixed held-out set."""

    def grid(self, path: Path) -> None:
        """Write a fixed grid of samples as an image."""

    def export(self, folder: Path) -> None:
        """Write the averaged weights in the layout that `escd.load_backbone` reads."""


@dataclass
class Progress:
    """How far a training is."""

    images: int = 0  # trained on, without earlier trainings
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    running: dict[str, Tensor] | None = None  # smoothed losses
    skipped: int = 0  # consecutive steps without a finite gradient
    earlier: list[dict[str, Any]] = field(default_factory=list)  # trainings that this one goes on from

    def add_losses(self, losses: dict[str, Tensor] | None, spacing: float) -> dict[str, float] | None:
        """Smooth a step's losses (None: it was skipped); returns the curve's new point, if one is due."""
        if losses is not None:
            before = self.running or losses
            self.running = {k: before[k] + SMOOTHING * (losses[k] - before[k]) for k in losses}
        if not self.running or (self.curve and self.images - self.curve[-1]["images"] < spacing):
            return None
        point = {k: round(float(v), 5) for k, v in self.running.items()}
        self.curve.append({"images": self.images, "seconds": round(self.seconds, 1), **point})
        return point


def train(
    make: Callable[[torch.device], Stage],
    *,
    weights: Path,
    checkpoint_seconds: float = 120.0,
    evaluations: int = 6,
    images: int | None = None,
    progress: bool = True,
    compile: bool = False,
    further: bool = False,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    optimizer: str | None = None,
) -> dict[str, Any]:
    """Train one stage to its number of images and export it; a killed run resumes where it stopped.

    On the same machine, a killed and resumed run gives the bits of an uninterrupted one. Its state
    (`escd.pretrain.state`) is ``runs/pretrain/<stage>/state.pt``, replaced atomically before the first step
    and every `checkpoint_seconds`. At `evaluations` points and at the end the averaged weights are scored,
    sampled, exported to `weights` and copied to ``checkpoints`` beside the state; at the end the record is
    written to ``training.json``. `compile` compiles the stage's heavy networks: minutes at the start, then
    a fifth less time per step on a CPU. `further` starts from the exported weights unless there is a state to
    resume; the record then lists earlier trainings under "earlier". `images`, `learning_rate`,
    `batch_size` and `optimizer` replace the recipe's. Returns the record. Raises FloatingPointError when the
    loss diverges, ValueError for an optimizer that the stage cannot have.
    """
    changes = {
        "images": images, "learning_rate": learning_rate, "batch_size": batch_size, "optimizer": optimizer,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    training = Training(make, weights, changes, further)
    if compile:
        for network in training.stage.heavy:
            network.compile(dynamic=False)
    training.run(evaluations, checkpoint_seconds, bar=progress)
    return training.write_record()


class Training:
    """A stage with its optimizer, averaged weights and progress."""

    def __init__(
        self, make: Callable[[torch.device], Stage], weights: Path, changes: dict[str, Any], further: bool
    ) -> None:
        # bfloat16 where it is native; GPUs before Ampere emulate it.
        older = autocast_dtype(choose_device()) is torch.float16
        self.accelerator = Accelerator(mixed_precision="fp16" if older else "bf16")
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.stage = make(self.device)
        self.config = replace(self.stage.loop, **changes)
        self.weights, self.folder = weights, RUNS / self.stage.name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.config.seed + self.accelerator.process_index)
        self.path = self.folder / "state.pt"
        self.state = read_state(self.path, self.accelerator.num_processes)  # of a killed run; else empty
        self.progress = Progress(**self.state.get("progress", {}))
        if further or self.progress.earlier:
            self.stage.load(weights)  # decides which parameters require gradients
        self.parameters = [p for p in self.stage.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(
            self.parameters, self._muon(), self.config.learning_rate, self.config.weight_decay
        )
        self.ema = EMAModel(
            self.parameters,
            decay=self.config.ema_decay,
            use_ema_warmup=True,
            power=0.75,
            foreach=self.device.type == "cuda",
        )
        self.ema.to(self.device)
        if self.state:
            self._restore()
        elif further:
            before = json.loads((weights / "training.json").read_text())[self.stage.name]
            self.progress.earlier = [*before.pop("earlier", []), {k: before[k] for k in EARLIER}]
            self.accelerator.print(f"{self.stage.name}: goes on from {weights}, {before['images']} images")
        # Images of earlier trainings are not used again.
        self.offset = sum(training["images"] for training in self.progress.earlier)

    def _muon(self) -> list[nn.Parameter]:
        """What Muon trains; ValueError for an optimizer that the stage cannot have."""
        if self.config.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {' or '.join(OPTIMIZERS)}, not {self.config.optimizer!r}")
        if self.config.optimizer != "muon":
            return []
        if not hasattr(self.stage, "muon_parameters"):
            raise ValueError(f"Muon is not for {self.stage.name}, which does not say what it may train")
        return self.stage.muon_parameters()

    def _restore(self) -> None:
        """Take networks, optimizer and progress from the state of a killed run.

        Raises ValueError for the state of another network.
        """
        state, module = self.state, self.stage.module
        trained = dict(module.named_parameters())
        for name, value in state["parameters"].items():
            if name not in trained or trained[name].shape != value.shape:
                raise ValueError(
                    f"{self.path} is the state of another network (its {name} is {tuple(value.shape)}): "
                    "move it away, or set ESCD_RUNS to another folder"
                )
            trained[name].data.copy_(value)
        module.load_state_dict(state["buffers"], strict=False)
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.progress.running is not None:
            self.progress.running = {k: v.to(self.device) for k, v in self.progress.running.items()}
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.print(f"{self.stage.name}: resumed at {self.progress.images} images")

    def _begin(self) -> None:
        """Restore random numbers, or write the first state; after this only training steps draw numbers."""
        if not self.state:
            self.save()  # resumes from these weights even if `weights` is overwritten later
            return
        own = self.state["processes"][self.accelerator.process_index]
        self.state = {}  # as large as the networks and the stage's images together
        set_random_state(own["random"], self.device)
        if own["stage"]:
            self.stage.load_state_dict(own["stage"])

    def run(self, evaluations: int, checkpoint_seconds: float, bar: bool) -> None:
        """Train to the configured number of images."""
        accelerator, progress, total = self.accelerator, self.progress, self.config.images
        self.model, self.optimizer = accelerator.prepare(self.stage.module, self.optimizer)
        due = [math.ceil(total * (k + 1) / evaluations) for k in range(evaluations)]
        due = [d for d in due if d > progress.images]
        self.bar = tqdm(
            total=total,
            initial=progress.images,
            unit="img",
            desc=self.stage.name,
            disable=not (bar and self.is_main),
            mininterval=5,
        )
        saved = started = time.monotonic()
        since = progress.seconds
        self._begin()
        with sdpa_kernel(attention_kernels(self.device)):
            while progress.images < total:
                losses = self.step()
                progress.seconds = since + time.monotonic() - started
                self._log(losses)
                if due and progress.images >= due[0]:
                    due = [d for d in due if d > progress.images]
                    self.evaluate()
                    self.save()
                    accelerator.wait_for_everyone()
                    continue
                if self.is_main and time.monotonic() - saved > checkpoint_seconds:
                    accelerator.set_trigger()
                if accelerator.check_trigger():  # in all processes at the same step
                    saved = time.monotonic()
                    self.save()
        self.bar.close()
        if not progress.scores or progress.scores[-1]["images"] < progress.images:
            self.evaluate()
        self.save()
        accelerator.wait_for_everyone()

    def step(self) -> dict[str, Tensor] | None:
        """One optimizer step on the next batch; its losses, or None where the gradient was not finite."""
        accelerator, progress, optimizer = self.accelerator, self.progress, self.optimizer
        share = self.config.batch_size // accelerator.num_processes
        for group in optimizer.param_groups:
            group["lr"] = self.config.rate(progress.images)
        with torch.no_grad():
            first = self.offset + progress.images + share * accelerator.process_index
            batch = self.stage.batch(first, share)
        with accelerator.autocast():
            loss, logs = self.model(batch)
        accelerator.backward(loss)
        # One non-finite gradient would spoil all weights. It is the same in all processes.
        finite = math.isfinite(accelerator.clip_grad_norm_(self.parameters, 1.0))
        progress.skipped = 0 if finite else progress.skipped + 1
        if finite or accelerator.scaler is not None:
            optimizer.step()  # the gradient scaler skips such a step by itself, and lowers its scale
        if finite:
            self.ema.step(self.parameters)
        else:
            tqdm.write(f"{self.stage.name}: step at {progress.images} images skipped: non-finite gradient")
        if progress.skipped == MOST_SKIPPED:
            raise FloatingPointError(
                f"{self.stage.name}: no finite gradient in {MOST_SKIPPED} consecutive steps, at "
                f"{progress.images} images; lower the learning rate"
            )
        optimizer.zero_grad(set_to_none=True)
        progress.images += share * accelerator.num_processes
        self.bar.update(share * accelerator.num_processes)
        return {k: v.detach().float() for k, v in {"loss": loss, **logs}.items()} if finite else None

    def _log(self, losses: dict[str, Tensor] | None) -> None:
        """Show and write the curve where a new point is due."""
        point = self.progress.add_losses(losses, self.config.images / CURVE_POINTS)
        if point is not None:
            self.bar.set_postfix(point, refresh=False)
            if not self.bar.disable:
                write_text(self.folder / "curve.json", json.dumps(self.progress.curve))

    def save(self) -> None:
        """Write the state; all processes call it at once."""
        own = self.stage.state_dict() if hasattr(self.stage, "state_dict") else {}
        processes = gather_object([{"random": random_state(self.device), "stage": own}])
        if not self.is_main:
            return
        module, scaler = self.stage.module, self.accelerator.scaler
        state = {
            "processes": processes,
            "parameters": {n: p.detach() for n, p in module.named_parameters() if p.requires_grad},
            "buffers": dict(module.named_buffers()),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        write_state(state, self.path)

    def evaluate(self) -> None:
        """Score, sample and export the averaged weights."""
        if not self.is_main:
            return
        stage, progress = self.stage, self.progress
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        stage.module.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                spent = {"images": progress.images, "seconds": round(progress.seconds, 1)}
                progress.scores.append({**spent, **stage.evaluate()})
                with together(self.folder) as scratch:
                    stage.grid(scratch / f"{progress.images:08d}.png")
                # named by the images of all trainings
                checkpoint = self.folder / "checkpoints" / f"{self.offset + progress.images:08d}"
                for folder in (self.weights, checkpoint):
                    with together(folder) as scratch:
                        stage.export(scratch)
        finally:
            stage.module.train()
            self.ema.restore(self.parameters)
        tqdm.write(f"{stage.name}: " + json.dumps(progress.scores[-1]))

    def write_record(self) -> dict[str, Any]:
        """The record of the finished training, written to ``training.json`` beside the weights."""
        progress, stage = self.progress, self.stage
        record = {
            "stage": stage.name,
            "config": asdict(self.config),
            "images": progress.images,
            "seconds": round(progress.seconds, 1),
            "environment": environment(self.accelerator),
            "scores": progress.scores,
            "curve": progress.curve,
            **(stage.facts() if hasattr(stage, "facts") else {}),
            **({"earlier": progress.earlier} if progress.earlier else {}),
        }
        if self.is_main:
            path = self.weights / "training.json"
            records = json.loads(path.read_text()) if path.exists() else {}
            write_text(path, json.dumps(records | {stage.name: record}, indent=1) + "\n")
        return record


def attention_kernels(device: torch.device) -> list[SDPBackend]:
    """PyTorch's attention kernels to train with.

    On a CPU the math kernel trains about twice as fast as the fused one at these short sequences.
    """
    if device.type == "cpu":
        return [SDPBackend.MATH]
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """The machine in a training record: device, architecture, processes, threads, version, precision."""
    cuda = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": accelerator.mixed_precision,
    }


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of images in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))
