"""`python -m escd`, as a person without a notebook uses it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from escd import ESCDPipeline, TuningConfig, customize, load_backbone, load_customization
from escd.backbone.model import Backbone
from escd.commands import _bytes_of, main
from escd.drawn import Drawn
from escd.ending import Ending
from escd.method.cost import TuningCost, tuning_cost
from escd.method.customization import steps_of


@pytest.fixture(autouse=True)
def few_views(monkeypatch) -> None:
    """How well something is learnt here does not matter, and one configuration costs the same each time."""
    for setting in ("VIEWS", "BATCH_SIZES"):
        monkeypatch.setattr(f"escd.method.config.{setting}", {"shape": 4, "appearance": 4})
    monkeypatch.setattr("escd.commands.tuning_cost", cost_of)


COSTS: dict[TuningConfig, TuningCost] = {}


def cost_of(backbone: Backbone, config: TuningConfig) -> TuningCost:
    if config not in COSTS:
        COSTS[config] = tuning_cost(backbone, config)
    return COSTS[config]


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
    for kind in ("diffusers", "lora", "embedding"):
        name = f"look-appearance-{kind}.safetensors"
        assert (here / "look" / name).is_file() and name in said
    assert "biases and norms" in said and "in ComfyUI embedding:look-appearance-embedding" in said
    assert main(["export", "look.safetensors", "--output", "look.safetensors", *base]) == 2
    assert "look.safetensors is no folder to write to" in capsys.readouterr().err


def test_generate_without_customizations(here, tiny_folder):
    (here / "escd").mkdir()  # as in a clone of this project
    assert main(["generate", "a red star", "--steps", "1", "--backbone", str(tiny_folder)]) == 0
    with Image.open("seed-0.png") as image:
        assert image.size == (16, 16)


LEARN = ["customize", "horse.png", "--attribute", "shape"]
ERRORS = {
    "nothing to export": (["export", "none.safetensors"], "no customization at none.safetensors"),
    "no image": (["customize", "none.png", "--attribute", "shape"], "No such file or directory: 'none.png'"),
    "text named png": (["customize", "text.png", "--attribute", "shape"], "text.png is not an image"),
    "unknown attribute": (
        ["customize", "horse.png", "--attribute", "colour"],
        "unknown attribute 'colour'; known: shape",
    ),
    "unknown part": ([*LEARN, "--part", "left"], "unknown part 'left'"),
    "negative steps": ([*LEARN, "--steps", "-1"], "steps must not be negative"),
    "no such folder": ([*LEARN, "--output", "no/x.safetensors"], "no folder no"),
    "output is a folder": ([*LEARN, "--output", "."], "this is a folder: name a file in it: '.'"),
    "output's name is too long": (
        [*LEARN, "--output", "x" * 300],
        "nothing can be written there: File name too long: 'xxx",
    ),
    "pictures to a file": (["generate", "a star", "--output", "horse.png"], "horse.png is no folder"),
    "nothing to draw": (["generate"], "say what to draw: a prompt, or --like FILE"),
    "like a picture that does not say": (
        ["generate", "--like", "horse.png"],
        "horse.png does not say how it was drawn",
    ),
    "mask of another size": ([*LEARN, "--mask", "small.png"], "the mask is 9 x 9"),
    "no sampling steps": (
        ["generate", "a star", "--steps", "0"],
        "num_inference_steps must be a whole number from 1 on",
    ),
    "no images": (["generate", "a star", "--images", "0"], "--images must be from 1 on"),
    "images without end": (["generate", "a star", "--images", "9" * 20], "at most 16384 images are drawn"),
    "like a picture that nests without end": (["generate", "--like", "nested.png"], "is not JSON"),
    "like a picture too large to be read": (["generate", "--like", "wide.png"], "is too large a picture"),
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
    nested = PngInfo()
    nested.add_text("escd", "[" * 100_000)
    Image.new("L", (9, 9)).save("nested.png", pnginfo=nested)
    data = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", data), (b"IDAT", b""))
    ]
    Path("wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
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
    command = [*warm.python(), "-m", "escd", "customize", "none.png", "--attribute", "shape"]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "escd: error: [Errno 2] No such file or directory: 'none.png'\n"


# ---- what can go wrong with files


def refuse(*_, **__):
    pytest.fail("it was tuned all the same")


@pytest.mark.skipif(sys.platform != "linux", reason="the folder of a Linux kernel")
def test_where_nothing_can_be_written_nothing_is_tuned(picture, here, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("escd.commands.load_backbone", refuse)
    command = ["customize", str(picture), "--attribute", "shape", "--backbone", str(tiny_folder)]
    assert main([*command, "--output", "/proc/x.safetensors"]) == 2
    assert "nothing can be written there" in capsys.readouterr().err


def test_a_full_disk_is_known_before(picture, here, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("escd.commands.customize", refuse)
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    command = ["customize", str(picture), "--attribute", "shape", "--backbone", str(tiny_folder)]
    assert main(command) == 2
    assert "MB are to be written where 0.1 MB are free: 'horse-shape.safetensors'" in capsys.readouterr().err


def test_the_bytes_of_a_result_are_known_before(backbone, appearance, tmp_path):
    config = TuningConfig.of("appearance", backbone=backbone)
    appearance.delta = {name: w.half() for name, w in appearance.delta.items()}
    size = appearance.save(tmp_path / "x.safetensors").stat().st_size
    assert size <= _bytes_of(backbone, config) <= size + 100_000


def test_a_result_that_cannot_be_written_is_kept_elsewhere(picture, here, tiny_folder, capsys, monkeypatch):
    (here / "out").mkdir()

    def then_the_folder_is_gone(*arguments, **options):
        learnt = customize(*arguments, **options)
        (here / "out").rmdir()
        return learnt

    monkeypatch.setattr("escd.commands.customize", then_the_folder_is_gone)
    command = ["customize", str(picture), "--attribute", "shape", "--steps", "1"]
    assert main([*command, "--output", "out/horse.safetensors", "--backbone", str(tiny_folder)]) == 2
    said = capsys.readouterr().err
    assert "what was learnt is kept in horse.safetensors" in said
    assert steps_of("horse.safetensors") == 1


def chunk(path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["escd"])


def test_pictures_do_not_replace_each_other_and_say_how_they_were_drawn(here, tiny_folder, shape, capsys):
    shape.save("horse.safetensors")
    base = ["--steps", "2", "--backbone", str(tiny_folder)]
    drawing = ["--shape", "horse.safetensors", "--shape-strength", "0.5", "--negative-prompt", "blue"]
    assert main(["generate", "a *m shape", *drawing, "--seed", "3", "--images", "2", *base]) == 0
    assert main(["generate", "a red star é", "--seed", "3", *base]) == 0
    assert capsys.readouterr().out.split() == ["seed-3.png", "seed-4.png", "seed-3-2.png"]
    assert chunk("seed-3-2.png")["prompt"] == "a red star é"
    about = chunk("seed-4.png")
    digest = hashlib.sha256(Path("horse.safetensors").read_bytes()).hexdigest()
    wanted = {
        "prompt": "a *m shape", "negative_prompt": "blue", "seed": 4, "steps": 2, "guidance_scale": 3.0,
        "guidance_from": "backbone", "shape_strength": 0.5,
        "shape": "horse.safetensors", "shape_sha256": digest, "appearance": None,
    }  # fmt: skip
    assert wanted.items() <= about.items() and str(here) not in json.dumps(about)

    Path("elsewhere").mkdir()
    base = ["--backbone", str(tiny_folder), "--output", "elsewhere"]
    assert main(["generate", "--like", "seed-4.png", *base]) == 0
    assert [path.name for path in Path("elsewhere").iterdir()] == ["seed-4.png"]
    assert Path("elsewhere/seed-4.png").read_bytes() == Path("seed-4.png").read_bytes()
    before = Path("seed-3.png").read_bytes()
    assert main(["generate", "--like", "seed-3-2.png", "--overwrite", "--backbone", str(tiny_folder)]) == 0
    assert chunk("seed-3.png")["prompt"] == "a red star é" and Path("seed-3.png").read_bytes() != before
    other = ["--shape-strength", "1", "--guidance-from", "customized"]
    assert main(["generate", "a star", "--like", "seed-4.png", *other, *base]) == 0
    about |= {"prompt": "a star", "shape_strength": 1.0, "guidance_from": "customized"}
    assert chunk("elsewhere/seed-4-2.png") == about

    with open("horse.safetensors", "ab") as file:
        file.write(b" ")
    assert main(["generate", "--like", "seed-4.png", *base]) == 2
    assert "drawn with the shape in horse.safetensors (sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "about",
    [
        "no json",
        "[]",
        '{"prompt": "a"}',
        {"seed": [1]},
        {"images": 0},
        {"guidance_from": "base"},
        {"shape": "x"},
        {"backbone": "somebody/gigabytes"},  # which are not fetched
    ],
)
def test_a_picture_that_says_nonsense_is_refused(about, here, tiny_folder, capsys):
    assert main(["generate", "a star", "--steps", "1", "--backbone", str(tiny_folder)]) == 0
    if isinstance(about, dict):
        about = json.dumps(chunk("seed-0.png") | about)
    text = PngInfo()
    text.add_text("escd", about)
    Image.new("RGB", (4, 4)).save("odd.png", pnginfo=text)
    assert main(["generate", "--like", "odd.png"]) == 2
    assert "odd.png" in capsys.readouterr().err


def test_an_image_of_an_earlier_version_was_drawn_from_the_customized_unet(here, tiny_folder):
    assert main(["generate", "a star", "--steps", "1", "--backbone", str(tiny_folder)]) == 0
    about = chunk("seed-0.png")
    del about["guidance_from"]
    text = PngInfo()
    text.add_text("escd", json.dumps(about))
    Image.new("RGB", (4, 4)).save("old.png", pnginfo=text)
    assert Drawn.read(Path("old.png")).guidance_from == "customized"


def test_a_console_may_know_few_characters(picture, here, tiny_folder, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    picture = picture.rename(here / "cheval-é.png")
    command = ["customize", str(picture), "--attribute", "shape", "--steps", "1"]
    assert main([*command, "--backbone", str(tiny_folder)]) == 0
    console.flush()
    assert rb"cheval-\xe9-shape.safetensors" in console.buffer.getvalue()
    assert steps_of("cheval-é-shape.safetensors") == 1


# ---- told to end

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def heard():
    """No signal is ignored, as some are in a process that a shell started in the background."""
    before = [signal.signal(each, signal.default_int_handler) for each in SIGNALS]
    yield
    for each, handler in zip(SIGNALS, before, strict=True):
        signal.signal(each, handler)


def told(number: int, at: int):
    """`customize` that is sent a signal after a step; at 0 before the first one."""

    def learn(*arguments, callback, **options):
        def after(step, loss):
            if step == at:
                os.kill(os.getpid(), number)
            return callback(step, loss)

        if at == 0:
            os.kill(os.getpid(), number)
        return customize(*arguments, callback=after, **options)

    return learn


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
    ids=str,
)
def test_told_to_end_it_keeps_what_it_has(
    number, code, word, heard, picture, here, tiny_folder, capsys, monkeypatch
):
    command = ["customize", str(picture), "--attribute", "shape", "--backbone", str(tiny_folder)]
    result = Path("horse-shape.safetensors")
    monkeypatch.setattr("escd.commands.customize", told(number, 0))
    assert main([*command, "--steps", "5"]) == code and not result.exists()
    assert capsys.readouterr().err.splitlines()[-1] == f"escd: {word}"
    monkeypatch.setattr("escd.commands.customize", told(number, 2))
    assert main([*command, "--steps", "5"]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"escd: {word} after 2 of 5 steps; what was learnt is kept in {result}"
    assert steps_of(result) == 2


def test_what_had_more_steps_is_not_replaced(heard, picture, here, tiny_folder, capsys, monkeypatch):
    command = ["customize", str(picture), "--attribute", "shape", "--backbone", str(tiny_folder)]
    command += ["--steps", "4"]
    result = Path("horse-shape.safetensors")
    monkeypatch.setattr("escd.commands.customize", told(signal.SIGINT, 3))
    assert main(command) == 130 and steps_of(result) == 3
    before = result.read_bytes()
    for at, kept in ((2, "horse-shape-2-steps"), (2, "horse-shape-2-steps-2"), (0, None)):
        monkeypatch.setattr("escd.commands.customize", told(signal.SIGTERM, at))
        assert main(command) == 143 and result.read_bytes() == before
        assert kept is None or f"is kept in {kept}.safetensors" in capsys.readouterr().err
        assert kept is None or steps_of(f"{kept}.safetensors") == 2
    result.write_text("something else")
    monkeypatch.setattr("escd.commands.customize", told(signal.SIGTERM, 2))
    assert main(command) == 143 and result.read_text() == "something else"


def test_a_second_signal_ends_at_once(heard):
    ending = Ending()
    with ending:
        assert ending.after_step(1, 0.5) is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.after_step(2, 0.5) is True and ending.code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert ending.code == 130
    assert all(signal.getsignal(each) is signal.default_int_handler for each in SIGNALS)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Ending() as ending:
            os.kill(os.getpid(), signal.SIGHUP)
        assert ending.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_drawing_is_one_line(heard, here, tiny_folder, capsys, monkeypatch):
    def interrupted(self, *_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ESCDPipeline, "__call__", interrupted)
    assert main(["generate", "a star", "--backbone", str(tiny_folder)]) == 130
    assert capsys.readouterr().err == "escd: interrupted\n"
    assert not list(here.glob("*.png"))
