"""Image files of every kind come out upright, RGB and of the right brightness, or are refused by name."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from effvit_zoo.data.images import BadImage, find_images, open_image

RED = (200, 30, 60)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (Image.new("RGB", (4, 3), RED), "PNG", RED),
        (Image.new("L", (4, 3), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 3), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (4, 3), RED).quantize(4), "GIF", RED),
        (Image.new("RGBA", (4, 3), (*RED, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (Image.new("LA", (4, 3), (0, 51)), "PNG", (204, 204, 204)),
        (Image.fromarray(np.full((3, 4), 40000, np.uint16)), "PNG", (156, 156, 156)),
        (Image.fromarray(np.full((3, 4), 40000, np.uint16)), "TIFF", (156, 156, 156)),
        (Image.fromarray(np.full((3, 4), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((3, 4), 90, np.float32)), "TIFF", (90, 90, 90)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    ],
)
def test_modes(image, form, expected):
    opened = open_image(encoded(image, form))
    assert (opened.mode, opened.size) == ("RGB", (4, 3))
    assert np.allclose(np.asarray(opened), expected, atol=1)


def test_transparent_palette_is_laid_on_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image, "PNG", transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), RED]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_orientation_and_damaged_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert open_image(encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif)).size == (30, 40)
    damaged = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_image(damaged).size == (40, 30)


def test_bad_files(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG").getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    contents = {
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "cut.png": whole[: len(whole) // 2],
        "flipped.png": bytes(flipped),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadImage) as raised:
            open_image(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert raised.value.reason
    with pytest.raises(BadImage, match="No such file"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="member 7"):
        open_image(io.BytesIO(b"x"), name="member 7")


def test_bad_image_goes_through_pickle():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "cut")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "cut", "cannot read image a.jpg: cut")


def test_find_images(tmp_path):
    for name in ("b/2.JPG", "b/.hidden/3.jpg", "a.png", "notes.txt", "empty/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_images([tmp_path])) == [tmp_path / "a.png", tmp_path / "b/2.JPG"]
    assert list(find_images([tmp_path / "notes.txt"])) == [tmp_path / "notes.txt"]  # named, so it is to be read
    with pytest.raises(BadImage, match="no image"):
        list(find_images([tmp_path / "empty"]))
    with pytest.raises(BadImage, match="no such file"):
        list(find_images([tmp_path / "gone"]))
