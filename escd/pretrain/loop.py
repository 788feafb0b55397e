"""The one training loop of every pretraining stage: resumable, distributed, logged, averaged."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from .state import random_state, read_state, set_random_state, write_state

RUNS = paths.RUNS / "pretrain"


KEPT = ("images", "seconds", "environment", "scores")  # of an earlier training's record
LEFT_OUT = 20  # steps without a finite gradient, one after the other, that end a training


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast one stage learns."""

    # Pictures seen in all; the learning rate decays to zero at this number, so a resumed run may raise it.
    images: int
    # Pictures a step, over all processes.
    batch_size: int
    learning_rate: float
    # Share of the images over which the learning rate rises, and over which it falls linearly to zero at the
    # end.
    warmup: float = 0.02
    decay: float = 0.5
    weight_decay: float = 0.01
    # The averaged model follows with rate (1 + step) ** -0.75, at most this.
    ema_decay: float = 0.9995
    seed: int = 0

    def rate(self, images: int) -> float:
        """The learning rate after so many images: linear warm-up, plateau, linear decay."""
        done = images / self.images
        return self.learning_rate * max(1e-3, min(1.0, done / self.warmup + 1e-3, (1 - done) / self.decay))


class Stage(Protocol):
    """What a pretraining stage gives the loop."""

    name: str
    loop: LoopConfig
    module: (
        nn.Module
    )  # module(batch) -> (loss, {name: scalar tensor}); only its parameters that require a gradient learn
    heavy: list[nn.Module]  # what is worth compiling; evaluation goes round that, through `forward`

    def load(self, folder: Path) -> None:
        """Take the exported weights of an earlier training; only stages that can be gone on with have it."""

    def batch(self, first: int, count: int) -> Any:
        """The training pictures first ... first + count - 1, ready for `module`."""

    def state_dict(self) -> dict[str, Any]:
        """What batches depend on besides their number; only stages that have such a thing have it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put that back."""

    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged model on a fixed held-out set."""

    def grid(self, path: Path) -> None:
        """A fixed grid of samples, to look at."""

    def export(self, folder: Path) -> None:
        """Write the averaged weights in the layout that `escd.load_backbone` reads."""


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What a training record says of the machine: device, processes, threads, versions."""
    cuda = accelerator.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": accelerator.mixed_precision,
    }


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
) -> dict[str, Any]:
    """Train one stage to its number of images and export it; picks up where a killed run left off.

    Killed at any moment and started again, it gives the bits it would have given on the same machine. The
    state (`escd.pretrain.state`) lies in ``runs/pretrain/<stage>/state.pt`` and is replaced, whole or not at
    all, before the first step and every `checkpoint_seconds`; at `evaluations` points along the way, and at
    the end, the averaged model is scored, its grid drawn, its weights exported, a copy of them put under
    ``checkpoints``, and the training record rewritten. `compile` takes minutes to begin and wins back a fifth
    of each step on a CPU. `further` starts from the exported weights where there is no state of a killed run;
    the record then keeps the earlier trainings' under "earlier", and the curve begins anew. `images`,
    `learning_rate` and `batch_size` replace the recipe's. Returns the record.
    """
    # bfloat16 where there is any; GPUs before Ampere would only emulate it.
    older = autocast_dtype(choose_device()) is torch.float16
    accelerator = Accelerator(mixed_precision="fp16" if older else "bf16")
    stage = make(accelerator.device)
    given = {"images": images, "learning_rate": learning_rate, "batch_size": batch_size}
    config = replace(stage.loop, **{name: value for name, value in given.items() if value is not None})
    folder = RUNS / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed + accelerator.process_index)

    path = folder / "state.pt"
    state = read_state(path, accelerator.num_processes)
    earlier: list[dict] = state.get("earlier", [])
    if further or earlier:
        stage.load(weights)  # before anything is asked which of its parameters learn
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.99), fused=True
    )
    seen, seconds, curve, scores, running, left_out = 0, 0.0, [], [], None, 0

    ema = EMAModel(
        parameters,
        decay=config.ema_decay,
        use_ema_warmup=True,
        power=0.75,
        foreach=accelerator.device.type == "cuda",
    )
    ema.to(accelerator.device)
    if state:
        learnt = dict(stage.module.named_parameters())
        for name, value in state["parameters"].items():
            if name not in learnt or learnt[name].shape != value.shape:
                raise ValueError(
                    f"{path} is the state of another network (its {name} is {tuple(value.shape)}): "
                    "move it away, or set ESCD_RUNS to another folder"
                )
            learnt[name].data.copy_(value)
        stage.module.load_state_dict(state["buffers"], strict=False)
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
        optimizer.load_state_dict(state["optimizer"])
        seen, seconds, curve, scores = state["seen"], state["seconds"], state["curve"], state["scores"]
        left_out = state["left_out"]
        if state["running"] is not None:
            running = {name: value.to(accelerator.device) for name, value in state["running"].items()}
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.print(f"{stage.name}: resumed at {seen} images")
    elif further:
        before = json.loads((weights / "training.json").read_text())[stage.name]
        earlier = [*before.pop("earlier", []), {k: before[k] for k in KEPT}]
        accelerator.print(f"{stage.name}: goes on from {weights}, {before['images']} images")

    # No picture of an earlier training is shown a second time.
    offset = sum(e["images"] for e in earlier)

    if compile:
        for network in stage.heavy:
            network.compile(dynamic=False)
    model, optimizer = accelerator.prepare(stage.module, optimizer)
    share = config.batch_size // accelerator.num_processes
    due = [math.ceil(config.images * (k + 1) / evaluations) for k in range(evaluations)]
    due = [d for d in due if d > seen]

    def save() -> None:
        """Called by all processes at once."""
        own = stage.state_dict() if hasattr(stage, "state_dict") else {}
        processes = gather_object([{"random": random_state(accelerator.device), "stage": own}])
        if not accelerator.is_main_process:
            return
        state = {
            "processes": processes,
            "parameters": {n: p.detach() for n, p in stage.module.named_parameters() if p.requires_grad},
            "buffers": dict(stage.module.named_buffers()),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "seen": seen,
            "seconds": seconds,
            "curve": curve,
            "scores": scores,
            "earlier": earlier,
            "running": running,
            "left_out": left_out,
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
        write_state(state, path)

    def evaluate() -> None:
        if not accelerator.is_main_process:
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        stage.module.eval()
        try:
            with torch.no_grad(), accelerator.autocast():
                scores.append({"images": seen, "seconds": round(seconds, 1), **stage.evaluate()})
                with together(folder) as scratch:
                    stage.grid(scratch / f"{seen:08d}.png")
                kept = folder / "checkpoints" / f"{offset + seen:08d}"  # named by the images of all trainings
                for place in (weights, kept):
                    with together(place) as scratch:
                        stage.export(scratch)
        finally:
            stage.module.train()
            ema.restore(parameters)
        tqdm.write(f"{stage.name}: " + json.dumps(scores[-1]))

    bar = tqdm(
        total=config.images,
        initial=seen,
        unit="img",
        desc=stage.name,
        disable=not (progress and accelerator.is_main_process),
        mininterval=5,
    )
    saved = started = time.monotonic()
    since = seconds
    # The math kernel trains about twice as fast as PyTorch's fused CPU attention at these short sequences.
    kernel = (
        [SDPBackend.MATH]
        if accelerator.device.type == "cpu"
        else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    # From here on nothing but the steps draws random numbers.
    if state:
        mine = state["processes"][accelerator.process_index]
        set_random_state(mine["random"], accelerator.device)
        if mine["stage"]:
            stage.load_state_dict(mine["stage"])
    else:
        save()  # a training that goes on from exported weights starts from these, whatever is exported since
    with sdpa_kernel(kernel):
        while seen < config.images:
            for group in optimizer.param_groups:
                group["lr"] = config.rate(seen)
            with torch.no_grad():
                batch = stage.batch(offset + seen + share * accelerator.process_index, share)
            with accelerator.autocast():
                loss, logs = model(batch)
            accelerator.backward(loss)
            # One gradient that is no number would end everything; it is the same in all processes.
            sound = math.isfinite(accelerator.clip_grad_norm_(parameters, 1.0))
            left_out = 0 if sound else left_out + 1
            if sound or accelerator.scaler is not None:
                optimizer.step()  # with a scaler it leaves such a step out by itself, and scales less
            if sound:
                ema.step(parameters)
            else:
                tqdm.write(f"{stage.name}: a step at {seen} images is left out, its gradient is no number")
            if left_out == LEFT_OUT:
                raise FloatingPointError(
                    f"{stage.name}: no finite gradient in {LEFT_OUT} steps on end, at {seen} images; "
                    "lower the learning rate"
                )
            optimizer.zero_grad(set_to_none=True)
            seen += share * accelerator.num_processes
            seconds = since + time.monotonic() - started
            bar.update(share * accelerator.num_processes)
            logs = {name: value.detach().float() for name, value in {"loss": loss, **logs}.items()}
            before = logs if running is None else running
            if sound:
                running = {k: before[k] + 0.05 * (logs[k] - before[k]) for k in logs}
            if running and (not curve or seen - curve[-1]["images"] >= config.images / 200):
                point = {k: round(float(v), 5) for k, v in running.items()}
                curve.append({"images": seen, "seconds": round(seconds, 1), **point})
                bar.set_postfix(point, refresh=False)
                if not bar.disable:
                    write_text(folder / "curve.json", json.dumps(curve))
            if due and seen >= due[0]:
                due = [d for d in due if d > seen]
                evaluate()
                save()
                accelerator.wait_for_everyone()
            else:
                if accelerator.is_main_process and time.monotonic() - saved > checkpoint_seconds:
                    accelerator.set_trigger()
                if accelerator.check_trigger():  # of all processes
                    saved = time.monotonic()
                    save()
    bar.close()
    if not scores or scores[-1]["images"] < seen:
        evaluate()
    save()
    accelerator.wait_for_everyone()
    record = {
        "stage": stage.name,
        "config": asdict(config),
        "images": seen,
        "seconds": round(seconds, 1),
        "environment": environment(accelerator),
        "scores": scores,
        "curve": curve,
        **({"earlier": earlier} if earlier else {}),
    }
    if accelerator.is_main_process:
        written = weights / "training.json"
        records = json.loads(written.read_text()) if written.exists() else {}
        records[stage.name] = record
        write_text(written, json.dumps(records, indent=1) + "\n")
    return record


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of images in [-1, 1]."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))
