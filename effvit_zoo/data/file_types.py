"""Which files are read as images, and what the others are: by extension, or by their first bytes."""

from __future__ import annotations

import importlib
import os
from typing import NamedTuple

from PIL import Image


class Plugin(NamedTuple):
    """A package that teaches Pillow a format.

    Attributes:
        package: What to `pip install`.
        module: What to import.
        register: Function of the module to call; "" where the import is enough.
    """

    package: str
    module: str
    register: str = ""


PLUGINS = {
    "HEIC": Plugin("pillow-heif", "pillow_heif", "register_heif_opener"),
    "AVIF": Plugin("pillow-avif-plugin", "pillow_avif"),
    "JPEG XL": Plugin("pillow-jxl-plugin", "pillow_jxl"),
}
_PLUGIN_SUFFIXES = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL"}
_COMMON = ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif .heic .heif .hif .jxl"
_RARE = ".jpe .jfif .apng .dib .pbm .pnm .tga .j2k .jpf .jpx"
_OTHERS = {
    "camera raw": ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .raw .rwl .3fr .iiq .x3f .kdc .mrw",
    "video": ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .flv .3gp .mts .m2ts .ogv",
    "archive": ".tar .zip .tgz .gz .bz2 .xz .7z .rar .zst",
    "drawing or document": ".svg .eps .ai .psd .xcf .pdf .doc .docx .ppt .pptx .odt",
    "array": ".npy .npz .mat .h5 .hdf5 .dcm .nii .fits .exr .hdr",
    "text or table": ".txt .csv .tsv .json .jsonl .xml .yaml .yml .md .log .xlsx .xls .parquet .html",
}
_KINDS = {suffix: kind for kind, suffixes in _OTHERS.items() for suffix in suffixes.split()}
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF"}
HEAD = 12
"""Number of bytes that `sniff` needs: of ISO media files "ftyp" and the brand are bytes 4 to 12."""
_SYSTEM_NAMES = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)


def _readable() -> tuple[str, ...]:
    """The extensions that Pillow opens here, with the plugins that are installed."""
    for plugin in PLUGINS.values():
        try:
            module = importlib.import_module(plugin.module)
        except ImportError:
            continue
        if plugin.register:
            getattr(module, plugin.register)()
    Image.init()
    formats = Image.registered_extensions()
    return tuple(suffix for suffix in f"{_COMMON} {_RARE}".split() if formats.get(suffix) in Image.OPEN)


IMAGE_SUFFIXES = _readable()


def is_image(name: str) -> bool:
    """Whether a file is read as an image, by its extension in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system, e.g. ".DS_Store", "._a.jpg", "__MACOSX", "Thumbs.db"."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def needs_plugin(kind: str) -> str:
    """What a file of a format in `PLUGINS` needs."""
    return f"{kind}, read after pip install {PLUGINS[kind].package}"


def why_left_out(name: str) -> str:
    """What a file is that is not read as an image, for a message."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _PLUGIN_SUFFIXES:
        return needs_plugin(_PLUGIN_SUFFIXES[suffix])
    return _KINDS.get(suffix) or (f"unknown type {suffix}" if suffix else "no extension")


def sniff(head: bytes) -> str | None:
    """What a file is that Pillow does not identify, from its first bytes; None where they don't tell."""
    if head[4:8] == b"ftyp":
        kind = _BRANDS.get(head[8:12])
        return _unidentified(kind) if kind else "video"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return _unidentified("JPEG XL")
    return None


def _unidentified(kind: str) -> str:
    """Why Pillow does not identify a file that begins like this format."""
    is_read = any(_PLUGIN_SUFFIXES.get(suffix) == kind for suffix in IMAGE_SUFFIXES)
    return f"damaged {kind}" if is_read else needs_plugin(kind)
