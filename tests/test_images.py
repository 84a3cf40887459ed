"""Image files of every kind come out upright, RGB and of the right brightness, or are refused by name."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from effvit_zoo.data import open_source
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
        (Image.fromarray(np.full((3, 4), 40000, np.int32)), "TIFF", (156, 156, 156)),
        (Image.fromarray(np.full((3, 4), 90, np.int32)), "TIFF", (90, 90, 90)),
        (Image.fromarray(np.full((3, 4), 200, np.uint16)), "PNG", (1, 1, 1)),
        (Image.fromarray(np.array([[0, 2**29], [2**30, 0]], np.int32)), "TIFF", (0, 128, 255, 0)),
        (Image.fromarray(np.full((3, 4), 0.5, np.float32)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((3, 4), 40000, np.float32)), "TIFF", (156, 156, 156)),
        (Image.fromarray(np.array([[np.nan, 0.5], [np.inf, -np.inf]], np.float32)), "TIFF", (0, 128, 255, 0)),
        (Image.fromarray(np.full((3, 4), 90, np.float32)), "TIFF", (90, 90, 90)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
    ],
)
def test_modes(image, form, expected):
    opened = open_image(encoded(image, form))
    assert (opened.mode, opened.size) == ("RGB", image.size)
    wanted = expected if image.width == 4 else np.repeat(np.reshape(expected, (2, 2, 1)), 3, axis=2)  # or a pixel each
    assert np.allclose(np.asarray(opened), wanted, atol=1)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header, *chunks, size=(4, 3)):
    """A PNG file; `header` is bits per channel and kind of colour."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, *header, 0, 0, 0))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IEND", b""))


def test_greys_that_pillow_has_no_mode_for():
    pixels = chunk(b"IDAT", zlib.compress(3 * (b"\0" + struct.pack(">4H", 40000, 40000, 0, 65535))))
    opened = open_image(png((16, 0), chunk(b"tRNS", struct.pack(">H", 40000)), pixels))
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [255, 255, 0, 255]
    content = struct.pack("<4I", 0, 2**31, 3 * 2**30, 2**32 - 1)  # as signed numbers three of them are below 0
    tags = {256: 4, 257: 1, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(content), 339: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = struct.pack("<4sI", b"II*\0", 8 + len(content)) + content + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert [open_image(io.BytesIO(tiff)).getpixel((x, 0))[0] for x in range(4)] == [0, 128, 191, 255]
    with pytest.raises(BadImage, match="its greys go from -1000 to 300: expected none below 0"):
        open_image(encoded(Image.fromarray(np.array([[-1000, 300]], np.int32)), "TIFF"))


@pytest.mark.parametrize(
    "metadata",
    [
        lambda: {"pnginfo": texts(1, 2_000_000)},
        lambda: {"pnginfo": texts(70, 1_000_000)},
        lambda: {"icc_profile": np.random.default_rng(0).bytes(2_000_000)},
    ],
    ids=["one text", "many texts", "colour profile"],
)
def test_long_metadata_does_not_hide_the_pixels(metadata):
    assert open_image(encoded(Image.new("RGB", (4, 3), RED), "PNG", **metadata())).getpixel((0, 0)) == RED


def texts(count, length):
    info = PngImagePlugin.PngInfo()
    for number in range(count):
        info.add_text(f"text {number}", "x" * length, zip=True)
    return info


@pytest.mark.parametrize("kind", ["text", "profile", "pixels"])
def test_what_decompresses_without_end_is_refused(kind):
    endless = zlib.compress(bytes(200_000_000), 9)
    pixels = chunk(b"IDAT", zlib.compress(bytes(15)))
    file = {
        "text": png((8, 0), chunk(b"zTXt", b"text\0\0" + endless), pixels),
        "profile": png((8, 0), chunk(b"iCCP", b"profile\0\0" + endless), pixels),
        "pixels": png((8, 0), pixels, size=(60_000, 60_000)),
    }[kind]
    with pytest.raises(BadImage, match=r"too large|exceeds limit"):
        open_image(file)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_image_of_several(form):
    others = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), "white")]}
    assert np.allclose(
        open_image(encoded(Image.new("RGB", (16, 16), RED), form, **others)).getpixel((8, 8)), RED, atol=3
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_file_is_what_its_content_says(tmp_path):
    """Neither a wrong suffix nor damaged metadata hides pixels; a drawing is not handed to another program."""
    Image.new("RGB", (4, 3), RED).save(tmp_path / "photo.jpg", format="PNG")
    assert open_image(tmp_path / "photo.jpg").getpixel((0, 0)) == RED
    pixels = chunk(b"IDAT", zlib.compress(3 * (b"\0" + bytes([77] * 4))))
    for damaged in (
        chunk(b"zTXt", b"a\0\0junk"),
        chunk(b"iCCP", b"a\0\0junk"),
        chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    ):
        assert open_image(png((8, 0), damaged, pixels)).getpixel((0, 0)) == (77, 77, 77)
    Image.new("RGB", (4, 3), RED).save(tmp_path / "drawing.jpg", format="EPS")
    with pytest.raises(BadImage, match="EPS files are drawings"):
        open_image(tmp_path / "drawing.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadImage, match="the file is empty"):
        open_image(tmp_path / "empty.jpg")


def test_torchvisions_folders_are_read_like_ours(tmp_path):
    """Its own reader would lay the transparent pixels on black."""
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        Image.new("RGBA", (4, 3), (*RED, 0)).save(tmp_path / "train" / label / "0.png")
    image, _ = open_source(f"torch/image_folder@{tmp_path}", "train").load(0)
    assert image.getpixel((0, 0)) == (255, 255, 255)


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


def test_a_damaged_file_of_a_format_that_is_read_is_not_blamed_on_a_missing_plugin(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.avif")
    (tmp_path / "a.avif").write_bytes((tmp_path / "a.avif").read_bytes()[:60])
    with pytest.raises(BadImage, match="damaged AVIF"):
        open_image(tmp_path / "a.avif")


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
