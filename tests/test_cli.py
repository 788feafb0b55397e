"""`python -m escd`, as a person without a notebook uses it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from escd import ESCDPipeline, load_backbone, load_customization
from escd.__main__ import main


@pytest.fixture
def picture(tmp_path) -> Path:
    image = Image.new("RGB", (40, 30), "white")
    image.paste("red", (10, 5, 30, 25))
    image.save(tmp_path / "horse.png")
    return tmp_path / "horse.png"


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_folder) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_customize_then_generate(picture, here, tiny_folder, capsys):
    base = ["--backbone", str(tiny_folder)]
    assert (
        main(["customize", str(picture), "--attribute", "shape", "--steps", "2", "--seed", "3", *base]) == 0
    )
    assert "horse-shape.safetensors" in capsys.readouterr().out
    backbone = load_backbone(tiny_folder, device="cpu")
    shape = load_customization("horse-shape.safetensors", backbone)
    assert (shape.attribute.name, shape.part, shape.steps, shape.seed) == ("shape", "encoder", 2, 3)

    Image.new("L", (40, 30), 255).save("mask.png")
    options = ["--steps", "1", "--part", "up.2/attn2", "--learning-rate", "1e-3", "--mask", "mask.png"]
    look_file = ["--output", "look.safetensors"]
    assert main(["customize", str(picture), "--attribute", "appearance", *options, *look_file, *base]) == 0
    look = load_customization("look.safetensors", backbone)
    assert look.part == "up.2/attn2" and look.config["learning_rate"] == 1e-3

    files = [
        "--shape",
        "horse-shape.safetensors",
        "--appearance",
        "look.safetensors",
        "--appearance-strength",
        "0.5",
    ]
    drawing = ["--images", "2", "--seed", "7", "--steps", "2", "--output", "out/deep"]
    assert main(["generate", "a *m shape with *a appearance", *files, *drawing, *base]) == 0
    assert capsys.readouterr().out.split()[-2:] == [
        str(Path("out/deep/seed-7.png")),
        str(Path("out/deep/seed-8.png")),
    ]
    pipe = ESCDPipeline(backbone, shape, look)
    seeds = [torch.Generator().manual_seed(s) for s in (7, 8)]
    images = pipe(
        "a *m shape with *a appearance",
        num_images_per_prompt=2,
        generator=seeds,
        num_inference_steps=2,
        appearance_strength=0.5,
    ).images
    for seed, image in zip((7, 8), images, strict=True):
        assert np.array_equal(np.asarray(Image.open(f"out/deep/seed-{seed}.png")), np.asarray(image))


def test_export_writes_what_other_programs_read(picture, here, tiny_folder, capsys):
    base = ["--backbone", str(tiny_folder)]
    learning = ["--attribute", "appearance", "--steps", "1", "--output", "look.safetensors"]
    assert main(["customize", str(picture), *learning, *base]) == 0
    assert main(["export", "look.safetensors", "--rank", "2", *base]) == 0
    said = capsys.readouterr().out
    for name in ("pytorch_lora_weights", "lora", "embedding"):
        assert (here / "look" / f"{name}.safetensors").is_file() and f"{name}.safetensors" in said
    assert "biases and norms" in said


def test_generate_without_customizations(here, tiny_folder):
    assert main(["generate", "a red star", "--steps", "1", "--backbone", str(tiny_folder)]) == 0
    with Image.open("seed-0.png") as image:
        assert image.size == (16, 16)


ERRORS = {
    "nothing to export": (["export", "none.safetensors"], "no customization at none.safetensors"),
    "no image": (["customize", "none.png", "--attribute", "shape"], "No such file or directory: 'none.png'"),
    "text named png": (["customize", "text.png", "--attribute", "shape"], "text.png is not an image"),
    "unknown attribute": (
        ["customize", "horse.png", "--attribute", "colour"],
        "unknown attribute 'colour'; known: shape",
    ),
    "unknown part": (
        ["customize", "horse.png", "--attribute", "shape", "--part", "left"],
        "unknown part 'left'",
    ),
    "negative steps": (
        ["customize", "horse.png", "--attribute", "shape", "--steps", "-1"],
        "steps must not be negative",
    ),
    "no such folder": (
        ["customize", "horse.png", "--attribute", "shape", "--output", "no/x.safetensors"],
        "no folder no",
    ),
    "mask of another size": (
        ["customize", "horse.png", "--attribute", "shape", "--mask", "small.png"],
        "the mask is 9 x 9",
    ),
    "no sampling steps": (
        ["generate", "a star", "--steps", "0"],
        "num_inference_steps must be a whole number from 1 on",
    ),
    "no images": (["generate", "a star", "--images", "0"], "--images must be from 1 on"),
    "negative strength": (
        ["generate", "a star", "--shape-strength", "-1"],
        "strength of shape must be a number from 0 on",
    ),
    "pseudo-word not loaded": (["generate", "a *m shape"], "'*m', but no customization"),
    "missing customization": (
        ["generate", "a *m", "--shape", "none.safetensors"],
        "no customization at none.safetensors",
    ),
    "truncated customization": (
        ["generate", "a *m", "--shape", "cut.safetensors"],
        "not a whole safetensors file",
    ),
    "no such backbone": (["generate", "a star", "--backbone", "nowhere"], "no backbone 'nowhere'"),
    "not a number": (
        ["generate", "a star", "--steps", "many"],
        "argument --steps: invalid int value: 'many'",
    ),
    "no attribute": (["customize", "horse.png"], "required: --attribute"),
    "no command": ([], "required: command"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_exit_code_2(arguments, message, picture, here, tiny_folder, capsys):
    Path("text.png").write_text("words\n" * 100)
    Path("cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    Image.new("L", (9, 9), 255).save("small.png")
    if arguments and "--backbone" not in arguments:
        arguments = [*arguments, "--backbone", str(tiny_folder)]
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse's own errors
        code = left.code
    assert code == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert "\n" not in printed and re.match(r"(escd|python -m escd.*): error: ", printed)


def test_as_a_command(here):
    command = [sys.executable, "-m", "escd", "customize", "none.png", "--attribute", "shape"]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "escd: error: [Errno 2] No such file or directory: 'none.png'\n"
