"""Seeded nonsense: files, pictures, prompts and numbers either work or are refused in one line.

Each case is drawn from a seed of its own, which a failure names. For a longer search, by hand:
`ESCD_FUZZ=50 ESCD_FUZZ_SEED=1 pytest tests/test_fuzz.py` draws fifty times as many cases of another seed.
"""

from __future__ import annotations

import io
import json
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import make_customization
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from escd import ESCDPipeline, TuningConfig, load_customization
from escd.backbone.folder import load_scheduler
from escd.backbone.model import Backbone
from escd.data.images import open_image_and_mask
from escd.loading import read_backbone
from escd.method.customization import FORMAT, load_customizations
from escd.method.low_rank import low_rank

TIMES = int(os.environ.get("ESCD_FUZZ", "1"))
SEED = int(os.environ.get("ESCD_FUZZ_SEED", "0"))
REFUSALS = (ValueError, TypeError, OSError, FloatingPointError)


def draws(kind: str, count: int) -> Iterator[tuple[str, random.Random]]:
    """(name of the case, its own generator) of `count` cases, or of TIMES as many."""
    for i in range(count * TIMES):
        name = f"{kind} {SEED} {i}"
        yield name, random.Random(name)


@contextmanager
def refused_in_one_line(case: str, *, naming: str = "") -> Iterator[None]:
    """Whatever goes wrong inside is one of REFUSALS, in one line that holds `naming`; else the test fails."""
    try:
        yield
    except REFUSALS as error:
        said = str(error)
        assert said and "\n" not in said and naming in said, f"case {case}: {error!r}"
    except Exception as error:
        error.add_note(f"case {case}")
        raise


@pytest.fixture(scope="module")
def fixed(tiny_folder) -> Backbone:
    """A tiny backbone that all cases share, as none may change it."""
    return read_backbone(tiny_folder, name="tiny")


# ---- bytes


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with some bytes changed, cut out, put in or moved; the beginning is where most of it goes."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        if not content:
            break
        reach = draw.choice([40, 400, len(content)])
        at = draw.randrange(min(reach, len(content)))
        match draw.randrange(6):
            case 0:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                content[at] = draw.choice([0, 1, 127, 128, 255])
            case 2:
                del content[at : at + draw.choice([1, 2, 4, 100])]
            case 3:
                content[at:at] = draw.randbytes(draw.choice([1, 2, 4, 100]))
            case 4:
                content = content[:at] if draw.random() < 0.3 else content
            case 5:
                content[at : at + 4] = draw.randrange(2**32).to_bytes(4, draw.choice(["big", "little"]))
    return bytes(content)


# ---- pictures

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000", "SGI", "AVIF")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV", "PA")


def picture(draw: random.Random) -> Image.Image:
    """A blot on a ground in one of MODES, with or without transparency."""
    mode, size = draw.choice(MODES), (draw.randrange(8, 40), draw.randrange(8, 40))
    alpha = draw.choice([255, 255, 0, 128])
    image = Image.new("RGBA", size, (*draw.randbytes(3), alpha))
    image.paste((*draw.randbytes(3), 255), (2, 2, size[0] // 2 + 2, size[1] // 2 + 2))
    if mode in ("I", "F", "I;16"):
        values = np.asarray(image.convert("L"), np.float64) * draw.choice([1, 257, 1 / 255, 1000])
        return Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image.convert("RGB"), srgb, lab, outputMode="LAB")
    return image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)


def encoded(image: Image.Image, draw: random.Random) -> bytes | None:
    """The file of a picture in one of FORMATS, with a profile, a rotation or a transparent value; or None."""
    options = {}
    if draw.random() < 0.3:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(draw.choice(["sRGB", "XYZ"]))).tobytes()
        options["icc_profile"] = damaged(profile, draw) if draw.random() < 0.5 else profile
    if draw.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = draw.choice([0, 1, 3, 6, 8, 9, 200])
        options["exif"] = damaged(exif.tobytes(), draw) if draw.random() < 0.5 else exif.tobytes()
    if draw.random() < 0.2:
        options["transparency"] = draw.choice([0, 255, 70_000])
    file = io.BytesIO()
    try:
        image.save(file, draw.choice(FORMATS), **options)
    except Exception:  # not every format holds every mode and option
        return None
    return file.getvalue()


def test_pictures(tmp_path):
    read = 0
    for case, draw in draws("picture", 300):
        image = picture(draw)
        content = encoded(image, draw)
        if content is None:
            continue
        file = tmp_path / "picture"
        file.write_bytes(damaged(content, draw) if draw.random() < 0.7 else content)
        mask = draw.choice([None, None, picture(draw).resize(image.size), file])
        size = draw.choice([16, 64])
        with refused_in_one_line(case), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it finds in the file
            x, inside = open_image_and_mask(draw.choice([file, file, image]), size, mask)
            assert x.shape == (3, size, size) and (x.abs() <= 1).all(), case
            assert inside is None or (inside.shape == (1, size, size) and 0.5 <= inside.max() <= 1), case
            read += 1
    assert read > 50 * TIMES, "most of the pictures were refused"


# ---- what a JSON file may hold

SCALARS = (
    *(None, True, False, 0, 1, -1, 7, 2**70, 0.5, float("nan"), float("inf"), "9" * 5000, "*" * 50),
    *("", "x", "shape", "*m", "../x", "none", "all", "\0", "é", "all/attn2+mid"),
)


def value(draw: random.Random, depth: int = 0) -> object:
    if depth < 3 and draw.random() < 0.3:
        items = [value(draw, depth + 1) for _ in range(draw.randrange(4))]
        return items if draw.random() < 0.5 else {str(draw.choice(SCALARS)): item for item in items}
    return draw.choice(SCALARS)


def tampered(table: dict, draw: random.Random) -> dict:
    """`table` with an entry exchanged, dropped or added, sometimes deeper down."""
    table = dict(table)
    key = draw.choice(list(table)) if table else "x"
    match draw.randrange(4):
        case 0:
            table.pop(key, None)
        case 1:
            table[str(draw.choice(SCALARS))] = value(draw)
        case 2 if isinstance(table.get(key), dict):
            table[key] = tampered(table[key], draw)
        case _:
            table[key] = value(draw)
    return table


def other_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """`tensors` with one of another dtype, shape, name or content, missing, or twice."""
    tensors = dict(tensors)
    name = draw.choice([draw.choice(list(tensors)), "pseudo_word"])
    w = tensors.pop(name)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64,
              torch.float8_e5m2, torch.uint8)  # fmt: skip
    match draw.randrange(7):
        case 0:
            return tensors
        case 1:
            tensors[name] = w.to(draw.choice(dtypes))
        case 2:
            flat = w.flatten()
            tensors[name] = draw.choice(
                [w[None], w.mT if w.ndim > 1 else flat[::2], flat, flat[:0], w.sum(), flat[:1]]
            )
        case 3:
            tensors[draw.choice(["x", "delta.", "up.x", f"delta.{name}", name.split(".", 1)[-1]])] = w
        case 4:
            w = w.clone()
            w.view(-1)[draw.randrange(w.numel())] = draw.choice([float("nan"), float("inf"), 6e4, -0.0])
            tensors[name] = w
        case 5:
            tensors |= {name: w, name.replace("up.", "delta.").replace("down.", "delta."): w.clone()}
        case 6:
            tensors[name] = torch.zeros(draw.choice([(), (0,), (1,), (32,), (16, 4, 3, 3), (1, 1, 1, 1, 1)]))
    return {key: w.contiguous().clone() for key, w in tensors.items()}


def test_customizations(fixed, tmp_path):
    file = low_rank(make_customization(fixed, "shape", seed=1), 2).save(tmp_path / "whole.safetensors")
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["about"])
    tensors = load_file(file)
    taken = 0
    for case, draw in draws("customization", 150):
        said, held = about, tensors
        for _ in range(draw.choice([1, 1, 2])):
            if draw.random() < 0.5:
                said = tampered(said, draw)
            else:
                held = other_tensors(held, draw) if "pseudo_word" in held else held
        content = as_bytes(held, metadata={"format": FORMAT, "about": json.dumps(said)})
        stranger = tmp_path / "stranger.safetensors"
        stranger.write_bytes(damaged(content, draw) if draw.random() < 0.3 else content)
        with refused_in_one_line(case, naming="stranger.safetensors"):
            loaded = load_customization(stranger, fixed)
            pipe = ESCDPipeline(fixed, attributes=[loaded])
            pipe.set_progress_bar_config(disable=True)
            taken += 1
            prompt = f"a {loaded.attribute.token} star"
            if draw.random() < 0.2 and len(prompt) < 12:
                pipe(prompt, num_inference_steps=1, output_type="latent")
    assert taken < 100 * TIMES, "most of the strangers were taken"


def test_lists_of_customizations_and_of_components(fixed, tiny_folder, tmp_path):
    make_customization(fixed, "shape").save(tmp_path / "shape.safetensors")
    index = json.loads((tiny_folder / "model_index.json").read_text())
    for case, draw in draws("list", 150):
        listed = json.dumps(draw.choice([value(draw), [value(draw)], ["shape", value(draw)]])).encode()
        if draw.random() < 0.3:
            listed = damaged(listed, draw)
        (tmp_path / "index.json").write_bytes(listed)
        with refused_in_one_line(case, naming=str(tmp_path)):
            assert set(load_customizations(tmp_path, fixed)) <= {"shape"}, case
        named = {**index, "scheduler": draw.choice([value(draw), ["diffusers", value(draw)]])}
        (tmp_path / "model_index.json").write_bytes(damaged(json.dumps(named).encode(), draw))
        with refused_in_one_line(case, naming="model_index.json"):
            load_scheduler(tmp_path)


# ---- prompts

PIECES = (
    *(
        "a",
        "star",
        "shape",
        "red",
        "*m",
        "*a",
        "*",
        "**",
        "*m*",
        "M*A*S*H",
        "*M",
        "*2",
        "(*m:1.2)",
        ",",
        "'s",
    ),
    *("", "\0", "\n", "%s", "{}", "<|endoftext|>", 7 * "star ", 20 * "zebra"),
    # no width, a wide asterisk, an accent apart, a horse, half a character, a dotted capital i, leftwards
    *("\u200b", "\uff0am", "e\u0301", "\U0001f40e", "\ud800", "\u0130", "\u202e"),
)


@pytest.mark.filterwarnings("ignore:.*only looks like an asterisk")
def test_prompts(fixed):
    word = {"*m": torch.zeros(32)}
    for case, draw in draws("prompt", 300):
        pieces = [draw.choice(PIECES) for _ in range(draw.choice([0, 1, 2, 4, 12]))]
        prompt = draw.choice([" ", " ", ""]).join(pieces)
        with refused_in_one_line(case):
            assert fixed.encode_prompt(prompt, draw.choice([None, word])).isfinite().all(), case
        with refused_in_one_line(case):
            fixed.encode_prompt(draw.choice([None, 3, [None], [prompt, 3], b"a star", [[prompt]]]), word)


# ---- numbers

NUMBERS = (
    *(
        0,
        1,
        2,
        3,
        8,
        16,
        -1,
        2**70,
        0.5,
        1.0,
        -0.5,
        1e30,
        1e308,
        float("nan"),
        float("inf"),
        1j,
        Fraction(1, 2),
    ),
    *(True, None, "3", "", [], [1], object()),
    *(np.float32(0.5), np.int64(1), np.float64("nan"), torch.tensor(1.0), torch.ones(2)),
)


def test_numbers_of_a_pipeline(fixed):
    pipe = ESCDPipeline(fixed, shape=make_customization(fixed, "shape"))
    pipe.set_progress_bar_config(disable=True)
    names = ("height", "width", "num_inference_steps", "guidance_scale", "shape_strength", "strengths",
             "appearance_strength", "num_images_per_prompt", "output_type", "negative_prompt",
             "guidance_from")  # fmt: skip
    for case, draw in draws("pipeline", 80):
        given = {name: draw.choice(NUMBERS) for name in draw.sample(names, draw.choice([1, 1, 2]))}
        with refused_in_one_line(case):
            pipe("a *m shape", **{"num_inference_steps": 1, "output_type": "latent", **given})


def test_numbers_of_a_tuning():
    fields = [
        name for name in TuningConfig.__dataclass_fields__ if name not in ("attribute", "recipe", "part")
    ]
    for case, draw in draws("tuning", 400):
        given = {name: draw.choice(NUMBERS) for name in draw.sample(fields, draw.choice([1, 1, 2]))}
        with refused_in_one_line(case):
            config = TuningConfig.of(draw.choice(["shape", "appearance"]), **given)
            torch.Generator().manual_seed(config.seed)
            json.dumps(vars(config), allow_nan=False)
