"""Opening a person's image, whatever it is."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, features

from escd.data.images import open_image, open_image_and_mask

RED = torch.tensor([1.0, -1, -1])


def halves(width: int = 40, height: int = 40) -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width, height // 2))
    return image


def is_halves(x: torch.Tensor) -> bool:
    return bool(
        (x[0, 1] > 0.9).all()
        and (x[2, 1] < -0.9).all()
        and (x[2, -2] > 0.9).all()
        and (x[0, -2] < -0.9).all()
    )


def test_a_plain_image(tmp_path):
    halves().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), halves()):
        x = open_image(source, 16)
        assert x.shape == (3, 16, 16) and x.dtype == torch.float32
        assert x.min() == -1 and x.max() == 1
        assert is_halves(x)


def test_nothing_is_cropped_and_the_rest_takes_the_borders_colour():
    image = Image.new("RGB", (60, 20), (10, 200, 30))
    image.paste("red", (0, 5, 4, 15))  # reaches the left edge, as no crop to the centre would show
    x = open_image(image, 30)
    green = torch.tensor([10, 200, 30]) / 127.5 - 1
    assert torch.allclose(x[:, 0, 0], green) and torch.allclose(x[:, -1, -1], green)
    assert (x[0, 15, 0] > 0.8) and (x[1, 15, 0] < -0.8)
    tall = open_image(image.rotate(90, expand=True), 30)
    assert torch.allclose(tall[:, :, 0].T, green.expand(30, 3))


def test_resizing_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    x = open_image(Image.fromarray(stripes), 32)
    assert x[:, :, 2:-2].abs().max() < 0.05  # grey, no beats


def test_a_tensor_is_taken_as_it_is():
    x = torch.rand(3, 16, 16) * 2 - 1
    assert torch.equal(open_image(x, 16), x)
    assert open_image(x.double().requires_grad_(), 32).shape == (3, 32, 32)
    wide = open_image(torch.zeros(3, 10, 40), 20)
    assert wide.shape == (3, 20, 20) and not wide.any()


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    halves(40, 40).rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert is_halves(open_image(tmp_path / "turned.jpg", 16))


def test_transparency_lies_on_white_and_gives_the_mask(tmp_path):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (8, 8, 24, 24))
    image.save(tmp_path / "cut.png")
    x, mask = open_image_and_mask(tmp_path / "cut.png", 32)
    assert (x[:, 0, 0] == 1).all() and torch.allclose(x[:, 16, 16], RED)
    assert mask.shape == (1, 32, 32) and mask[0, 16, 16] == 1 and mask[0, 0, 0] == 0
    assert mask.mean() == pytest.approx(0.25)
    assert torch.equal(open_image(tmp_path / "cut.png", 32), x)
    assert open_image_and_mask(halves(), 32)[1] is None


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 255, 0, 255, 0, 0])
    image.paste(1, (4, 4, 12, 12))
    image.save(tmp_path / "p.png", transparency=0)
    x = open_image(tmp_path / "p.png", 16)
    assert (x[:, 0, 0] == 1).all() and torch.allclose(x[:, 8, 8], RED)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "CMYK", "YCbCr", "HSV", "P", "RGBA"])
def test_modes(mode, tmp_path):
    x = open_image(halves().convert("RGB").convert(mode), 16)
    assert x.shape == (3, 16, 16)
    if mode in ("CMYK", "YCbCr", "HSV", "P", "RGBA"):
        assert is_halves(x)
    else:
        assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])


def test_a_cmyk_photograph(tmp_path):
    halves().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert is_halves(open_image(tmp_path / "print.jpg", 16))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    for name in ("deep.png", "float.tiff"):
        x = open_image(tmp_path / name, 64)
        torch.testing.assert_close(x[1], torch.from_numpy(values / 32767.5 - 1).float(), atol=0.005, rtol=0)
    Image.fromarray((values / 100).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="must lie in 0"):
        open_image(tmp_path / "float.tiff", 64)


@pytest.mark.parametrize("kind", [np.int32, np.uint16])
def test_wide_files_of_8_bit_values(kind, tmp_path):
    values = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    picture = Image.fromarray(values.astype(kind))
    picture.save(tmp_path / "wide.tiff")
    for source in (picture, tmp_path / "wide.tiff"):
        x = open_image(source, 64)
        torch.testing.assert_close(x[1], torch.from_numpy(values / 127.5 - 1).float(), atol=0.01, rtol=0)


def test_wide_values_that_are_no_grey_name_the_file(tmp_path):
    for name, value in (("below", -1), ("above", 70_000)):
        Image.new("I", (16, 16), value).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ValueError, match=rf"{name}\.tiff .*must lie in 0\.\.65535"):
            open_image(tmp_path / f"{name}.tiff", 16)
    with pytest.raises(ValueError, match=r"the image .*must lie in 0\.\.1"):
        open_image(Image.new("F", (16, 16), float("nan")), 16)


def test_sixteen_bits_with_a_transparent_value(tmp_path):
    values = np.full((16, 16), 40_000, np.uint16)
    values[:, :8] = 7
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=7)
    x, inside = open_image_and_mask(tmp_path / "deep.png", 16)
    assert (inside[0, :, :7] == 0).all() and (inside[0, :, 9:] == 1).all()
    assert (x[:, :, 0] == 1).all() and (x[:, :, -1] - (40_000 / 32767.5 - 1)).abs().max() < 0.01


# ---- colour profiles

D50 = {  # red, green and blue as XYZ: matrices of the ICC profiles, a column each
    "sRGB": [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
    "Display P3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
    "Adobe RGB": [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
}


def profile(columns: list[list[float]] | None, gamma: float = 2.2) -> bytes:
    """An ICC profile (version 2) of three primaries and a gamma; None: of grey."""

    def number(x: float) -> bytes:
        return round(x * 65536).to_bytes(4, "big", signed=True)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249)}
    if columns is None:
        tags[b"kTRC"] = curve
    else:
        for i, name in enumerate(b"rgb"):
            tags |= {bytes([name]) + b"XYZ": xyz(*(row[i] for row in columns)), bytes([name]) + b"TRC": curve}
    table, data, start = len(tags).to_bytes(4, "big"), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (start + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    colours = b"GRAY" if columns is None else b"RGB "
    head = bytes(8) + b"\x02\x20\0\0mntr" + colours + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(number, (0.9642, 1, 0.8249)))
    whole = head.ljust(128, b"\0") + table + data
    return len(whole).to_bytes(4, "big") + whole[4:]


def in_srgb(colour: tuple[int, ...], columns: list[list[float]], gamma: float = 2.2) -> np.ndarray:
    """The levels of sRGB that a colour of other primaries has, by arithmetic."""
    linear = np.linalg.solve(D50["sRGB"], np.array(columns) @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_colours_are_converted_to_srgb(space, ending, tmp_path):
    colour = (90, 160, 120)
    Image.new("RGB", (16, 16), colour).save(
        tmp_path / f"x.{ending}", icc_profile=profile(D50[space]), quality=100
    )
    levels = (open_image(tmp_path / f"x.{ending}", 16)[:, 8, 8] * 127.5 + 127.5).numpy()
    expected = in_srgb(colour, D50[space])
    assert np.abs(expected - colour).max() > 8, "the profile does not matter for this colour"
    np.testing.assert_allclose(levels, expected, atol=3)


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "LA", "1"])
def test_profiles_of_pictures_of_other_modes(mode, tmp_path):
    grey = mode in ("L", "LA", "1")
    colour = (120, 120, 120) if grey else (90, 160, 120)
    picture = Image.new("RGB", (16, 16), "white" if mode == "1" else colour)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, 1).repeat(16, 0)))
    own = profile(None if grey else D50["Adobe RGB"], gamma=1.4 if grey else 2.2)
    picture.save(tmp_path / "x.png", icc_profile=own)
    x, inside = open_image_and_mask(tmp_path / "x.png", 16)
    expected = in_srgb(colour, D50["sRGB"], 1.4) if grey else in_srgb(colour, D50["Adobe RGB"])
    expected = np.full(3, 255) if mode == "1" else expected
    np.testing.assert_allclose((x[:, 8, 15] * 127.5 + 127.5).numpy(), expected, atol=2)
    assert (inside is not None) == (mode in ("RGBA", "LA"))


def test_a_picture_in_srgb_stays_as_it_is_and_lab_is_read():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    srgb, plain = ImageCms.createProfile("sRGB"), Image.fromarray(pixels)
    tagged = plain.copy()
    tagged.info["icc_profile"] = ImageCms.ImageCmsProfile(srgb).tobytes()
    assert torch.equal(open_image(tagged, 16), open_image(plain, 16))
    plain = Image.new("RGB", (16, 16), (150, 60, 90))
    lab = ImageCms.profileToProfile(plain, srgb, ImageCms.createProfile("LAB"), outputMode="LAB")
    assert (open_image(lab, 16) - open_image(plain, 16)).abs().max() < 0.03


@pytest.mark.parametrize("broken", [b"words", profile(D50["sRGB"])[:200], profile(None)])
def test_a_profile_that_cannot_be_used_is_told(broken, tmp_path):
    halves().save(tmp_path / "x.png", icc_profile=broken)
    with pytest.warns(UserWarning, match=r"profile of .*x\.png cannot be used .*taken as sRGB"):
        assert is_halves(open_image(tmp_path / "x.png", 16))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [halves(), Image.new("RGB", (40, 40), "green"), Image.new("RGB", (40, 40), "black")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert is_halves(open_image(tmp_path / "a.gif", 16))


# ---- what is refused


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png", 16)
    with pytest.raises(IsADirectoryError, match="directory"):
        open_image(tmp_path, 16)


@pytest.mark.parametrize(
    "content", [b"just words\n" * 50, b"", b"\x89PNG\r\n\x1a\n", b"\0\0\0\x14ftypisom\0\0\0\0mp42"]
)
def test_what_is_no_image(content, tmp_path):
    (tmp_path / "text.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.png is (not an image|damaged)"):
        open_image(tmp_path / "text.png", 16)


FORMATS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(x) =\n",
    "PDF": b"%PDF-1.7\n",
    "SVG": b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_not_read_are_named_with_a_remedy(kind, tmp_path):
    (tmp_path / "photo.png").write_bytes(FORMATS[kind] + bytes(100))
    with pytest.raises(ValueError, match=rf"photo\.png is of the format {kind}, .*PNG"):
        open_image(tmp_path / "photo.png", 16)


def test_postscript_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "drawing.eps").write_bytes(FORMATS["EPS"])
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    with Image.open(tmp_path / "drawing.eps") as opened:
        for source in (tmp_path / "drawing.eps", opened):
            with pytest.raises(ValueError, match=r"format EPS.*Ghostscript.*PNG"):
                open_image(source, 16)


def test_avif_is_read_where_pillow_reads_it(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    halves().save(tmp_path / "x.avif", quality=100)
    assert is_halves(open_image(tmp_path / "x.avif", 16))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("kept", [0.95, 0.6, 0.2])
def test_a_truncated_image(suffix, kept, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    file = tmp_path / f"cut.{suffix}"
    noise.save(file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} is (not an image|damaged or cut short)"):
        open_image(file, 16)


def test_small_images(tmp_path):
    for size in ((1, 1), (7, 100), (100, 7)):
        with pytest.raises(ValueError, match="at least 8 px"):
            open_image(Image.new("RGB", size), 16)
    with pytest.raises(ValueError, match="at least 8 px"):
        open_image(torch.zeros(3, 1, 1), 16)
    assert open_image(Image.new("RGB", (8, 8), "red"), 16).shape == (3, 16, 16)
    assert open_image(Image.new("RGB", (8, 4000), "red"), 16).shape == (3, 16, 16)


def bomb(path, side: int) -> None:
    """A valid PNG header of side x side pixels, and no pixels worth the name."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_001, 14_143, 60_000])
def test_bombs_are_refused_by_their_header(side, tmp_path):
    bomb(tmp_path / "bomb.png", side)
    with pytest.raises(ValueError, match=r"bomb\.png is larger than 100 megapixels"):
        open_image(tmp_path / "bomb.png", 16)


def test_just_below_the_limit_is_read_without_a_warning(tmp_path):
    bomb(tmp_path / "large.png", 9_900)  # 98 megapixels, where Pillow warns; the file has no such pixels
    with pytest.raises(ValueError, match=r"large\.png is damaged or cut short"):
        open_image(tmp_path / "large.png", 16)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(16, 16),
        torch.zeros(1, 16, 16),
        torch.zeros(1, 3, 16, 16),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.full((3, 16, 16), 255.0),
        torch.full((3, 16, 16), float("nan")),
    ],
)
def test_tensors_that_are_no_images(tensor):
    with pytest.raises(ValueError, match="an image tensor"):
        open_image(tensor, 16)


def test_other_things():
    with pytest.raises(TypeError, match="not ndarray"):
        open_image(np.zeros((16, 16, 3)), 16)


# ---- masks


def test_a_given_mask_is_padded_with_the_image(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (0, 0, 20, 20))
    mask.save(tmp_path / "mask.png")
    as_tensor = torch.zeros(20, 40)
    as_tensor[:, :20] = 1
    for given in (mask, tmp_path / "mask.png", mask.convert("RGB"), as_tensor, as_tensor[None]):
        _, inside = open_image_and_mask(image, 40, given)
        assert inside.shape == (1, 40, 40)
        assert inside[0, 20, 5] == 1 and inside[0, 20, 35] == 0
        assert not inside[0, :10].any() and not inside[0, 30:].any()  # the padding is not the subject


def test_a_mask_takes_the_place_of_transparency():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 40))
    image.paste((255, 0, 0, 255), (4, 4, 12, 12))
    assert open_image_and_mask(image, 16)[1].mean() < 0.5
    _, inside = open_image_and_mask(image, 16, Image.new("L", (16, 16), 255))
    assert inside.all()


def test_a_fully_transparent_picture_has_its_own_message(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    for mask in (None, Image.new("L", (16, 16), 255)):
        with pytest.raises(ValueError, match=r"glass\.png is fully transparent"):
            open_image_and_mask(tmp_path / "glass.png", 16, mask)
    faint = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    faint.paste((255, 0, 0, 90), (4, 4, 12, 12))
    with pytest.raises(ValueError, match=r"the image is too transparent .*above 0\.35 at 16 px.*mask="):
        open_image_and_mask(faint, 16)


def test_transparency_without_an_outline_is_no_mask():
    for alpha in (255, 200):  # opaque, and a haze all over
        assert open_image_and_mask(Image.new("RGBA", (16, 16), (255, 0, 0, alpha)), 16)[1] is None


@pytest.mark.parametrize("ink", ["white", "black", "red"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_of_ink_on_transparency_is_its_alpha(ink, mode, tmp_path):
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste(ink, (8, 8, 24, 24))
    mask = mask.convert(mode) if mode != "P" else mask.quantize(8)
    mask.save(tmp_path / "ink.png")
    for given in (mask, tmp_path / "ink.png"):
        _, inside = open_image_and_mask(Image.new("RGB", (32, 32), "blue"), 32, given)
        assert inside.mean() == pytest.approx(0.25) and inside[0, 16, 16] == 1


def test_an_opaque_mask_with_an_alpha_channel_is_white_on_the_subject():
    mask = Image.new("RGBA", (32, 32), "black")
    mask.paste("white", (8, 8, 24, 24))
    _, inside = open_image_and_mask(Image.new("RGB", (32, 32)), 32, mask)
    assert inside.mean() == pytest.approx(0.25)


def test_an_empty_mask_says_how_bright_it_is():
    ones = Image.fromarray(np.ones((16, 16), np.uint8))  # 1 of 255: as numerical programs write masks
    with pytest.raises(ValueError, match=r"mask is empty.*white \(1\).*nothing in it is above 0\.00"):
        open_image_and_mask(Image.new("RGB", (16, 16)), 16, ones)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (16, 17), 255), r"mask is 16 x 17 px, the image 16 x 16 px"),
        (Image.new("L", (16, 16), 0), "mask is empty"),
        (torch.ones(1, 17, 16), r"mask is 16 x 17 px"),
        (torch.ones(3, 16, 16), r"a mask is \(H, W\) or \(1, H, W\)"),
        (torch.full((16, 16), 255.0), r"a mask is .* in \[0, 1\]"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        open_image_and_mask(Image.new("RGB", (16, 16)), 16, mask)
