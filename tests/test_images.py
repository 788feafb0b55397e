"""Opening a person's image, whatever it is."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from escd.images import open_image, open_image_and_mask

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
    "content", [b"just words\n" * 50, b"", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_image(content, tmp_path):
    (tmp_path / "text.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.png is (not an image|damaged)"):
        open_image(tmp_path / "text.png", 16)


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
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    _, inside = open_image_and_mask(image, 16, Image.new("L", (16, 16), 255))
    assert inside.all()
    with pytest.raises(ValueError, match="mask is empty"):
        open_image_and_mask(image, 16)


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
