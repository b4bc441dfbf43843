"""Broken, hostile and merely unusual images and records, each with what should become of it.

`write` makes the files and a list of them, `records.jsonl`: line i is kind i of `KINDS`. A cause of None stands for a
record that can be trained on. Beside them lies an image whose name only folders and archives can hold. Nothing is
downloaded, and nothing is larger than a few megabytes on disk.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.folders import EXTENSIONS
from data_pipelines.records import Cause

SIZE = (96, 64)
NO_TEXT = "no utf-8 \udcff.png"  # a name with the byte 255; JSON is text and cannot have it


class Kind(NamedTuple):
    """One line of the list.

    Attributes:
      name: what is wrong with it; the image file's name where there is one.
      cause: what it is counted under; None if it is fine.
      line: what stands in the list, if that is not a record of the image file.
      make: writes the image file; None where there is none.
      needs_caption: it is fine where no caption is needed.
    """

    name: str
    cause: Cause | None
    line: bytes | None = None
    make: Callable[[Path], Any] | None = None
    needs_caption: bool = False


def write(folder: Path) -> Path:
    """Writes the set and returns the path of its list."""
    lines = []
    for kind in KINDS:
        if kind.make is not None:
            kind.make(folder / kind.name)
        lines.append(kind.line if kind.line is not None else record(kind.name))
    (folder / NO_TEXT).write_bytes(encoded("PNG"))
    path = folder / "records.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def write_tar(folder: Path) -> tuple[Path, list[Cause | None]]:
    """An archive of the images of the set that are ordinary files; its path, and the cause of each record."""
    kinds = [
        kind for kind in IMAGES if kind.make and kind.cause in _OF_CONTENT and Path(kind.name).suffix in EXTENSIONS
    ]
    named = [(kind.name, kind.cause) for kind in kinds] + [(NO_TEXT, None)]
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, (name, _) in enumerate(named):
            data = (folder / name).read_bytes()
            member = tarfile.TarInfo(f"{number:03d}/{name}")  # its own key: the name is used in several formats
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder / "images.tar", [cause for _, cause in named]


def record(path: Any, **more: Any) -> bytes:
    """A line of the list."""
    return json.dumps({"path": path, "prompt": "a picture"} | more).encode()


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise, so that the files are long enough to be cut, and no two parts of them alike."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, image_format, **options)
    return file.getvalue()


def saved(image_format: str, mode: str = "RGB", **options: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(encoded(image_format, mode, **options))


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def cut(image_format: str, share: float = 0.5, **options: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        data = encoded(image_format, **options)
        path.write_bytes(data[: int(len(data) * share)])

    return make


def values(array: np.ndarray) -> Callable[[Path], Any]:
    return lambda path: Image.fromarray(array).save(path)


def animated(image_format: str) -> Callable[[Path], Any]:
    return saved(image_format, save_all=True, append_images=[Image.new("RGB", SIZE, "blue")] * 3)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    picture().save(path, "JPEG", exif=exif)


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    png = encoded("PNG")
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + chunk + png[33:]  # behind the signature and the header chunk


def png_of_size(width: int, height: int) -> bytes:
    """The header claims a size; the pixels are those of another."""
    png = encoded("PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def jpeg_of_size(width: int, height: int) -> bytes:
    jpeg = encoded("JPEG")
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def gif_of_size(width: int, height: int) -> bytes:
    gif = encoded("GIF")
    return gif[:6] + struct.pack("<HH", width, height) + gif[10:]


def flipped(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def after(data: bytes, mark: bytes, new: bytes) -> bytes:
    """`new` written over what follows a mark."""
    place = data.index(mark) + len(mark)
    return data[:place] + new + data[place + len(new) :]


def sparse(path: Path) -> None:
    """A file that says to be of 8 GiB, and takes no space."""
    path.touch()
    os.truncate(path, 8 << 30)


def forbidden(path: Path) -> None:
    """A file that may not be read. A superuser may read any but a few of the kernel's, which can only be written."""
    if os.geteuid():
        path.write_bytes(encoded("PNG"))
        path.chmod(0)
    else:
        path.symlink_to("/proc/sys/vm/compact_memory")


def linked_in_a_circle(path: Path) -> None:
    other = path.with_name(f"{path.name}.other")
    path.symlink_to(other.name)
    other.symlink_to(path.name)


def linked(path: Path) -> None:
    other = path.with_name(f"{path.name}.other")
    other.write_bytes(encoded("PNG"))
    path.symlink_to(other.name)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>'
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n(/etc/passwd) run\n%%EOF\n"
FINE_EXIF = b"Exif\0\0MM\0*\0\0\0\x08"

IMAGES = [
    # Unusual, and fine.
    Kind("plain.jpg", None, make=saved("JPEG")),
    Kind("progressive.jpg", None, make=saved("JPEG", progressive=True)),
    Kind("grey.jpg", None, make=saved("JPEG", "L")),
    Kind("cmyk.jpg", None, make=saved("JPEG", "CMYK")),
    Kind("cmyk.tif", None, make=saved("TIFF", "CMYK")),
    Kind("lab.tif", None, make=lambda path: Image.new("LAB", SIZE).save(path)),
    Kind("no size for the whole.gif", None, make=content(gif_of_size(0, 0))),  # its frames have one
    Kind("several pictures.mpo", None, make=saved("MPO", save_all=True, append_images=[picture()])),
    Kind("grey with alpha.png", None, make=saved("PNG", "LA")),
    Kind("alpha.png", None, make=saved("PNG", "RGBA")),
    Kind("alpha.webp", None, make=saved("WEBP", "RGBA")),
    Kind("palette with transparency.png", None, make=saved("PNG", "P", transparency=3)),
    Kind("two colours.png", None, make=saved("PNG", "1")),
    Kind("lossless.webp", None, make=saved("WEBP", lossless=True)),
    Kind("plain.bmp", None, make=saved("BMP")),
    Kind("plain.avif", None, make=saved("AVIF")),
    Kind("plain.jp2", None, make=saved("JPEG2000")),
    Kind("plain.ppm", None, make=saved("PPM")),
    Kind("sixteen bits.png", None, make=values(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
    Kind("sixteen bits.tif", None, make=values(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
    Kind("animated.gif", None, make=animated("GIF")),
    Kind("animated.webp", None, make=animated("WEBP")),
    Kind("animated.png", None, make=animated("PNG")),
    Kind("one pixel.png", None, make=lambda path: picture(size=(1, 1)).save(path)),
    Kind("a line across.png", None, make=lambda path: picture(size=(60000, 1)).save(path)),
    Kind("a line down.png", None, make=lambda path: picture(size=(1, 60000)).save(path)),
    Kind("a line across.jpg", None, make=lambda path: picture(size=(60000, 2)).save(path)),
    Kind("turned.jpg", None, make=turned),
    Kind("corrupt exif.jpg", None, make=saved("JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\x01garbage")),
    Kind("exif without an end.jpg", None, make=saved("JPEG", exif=FINE_EXIF + b"\xff\xff\x01\x12")),
    Kind("exif is text.jpg", None, make=saved("JPEG", exif=b"Exif\0\0hello")),
    Kind("corrupt icc.jpg", None, make=saved("JPEG", icc_profile=b"no profile" * 40)),
    Kind("corrupt icc.png", None, make=saved("PNG", icc_profile=b"\0" * 9)),
    Kind("a png.jpg", None, make=saved("PNG")),
    Kind("a jpeg.png", None, make=saved("JPEG")),
    Kind("no extension", None, make=saved("WEBP")),
    Kind("bad checksum of whole pixels.png", None, make=content(flipped(encoded("PNG"), -14))),
    Kind("bytes behind its end.jpg", None, make=content(encoded("JPEG") + b"MZ" * 9000)),
    Kind("link.png", None, make=linked),
    Kind("bild äöü 図 \U0001f600.png", None, make=saved("PNG")),
    # Files that are none.
    Kind("no such file.jpg", Cause.MISSING),
    Kind("no such folder/a.jpg", Cause.MISSING),
    Kind("link to nowhere.jpg", Cause.MISSING, make=lambda path: path.symlink_to("nowhere")),
    Kind("plain.jpg/below a file.jpg", Cause.MISSING),
    Kind("n" * 300 + ".jpg", Cause.MISSING),
    Kind("may not be read.png", Cause.PERMISSION, make=forbidden),
    Kind("folder.jpg", Cause.NOT_A_FILE, make=Path.mkdir),
    Kind("links in a circle.jpg", Cause.NOT_A_FILE, make=linked_in_a_circle),
    Kind("pipe.jpg", Cause.NOT_A_FILE, make=os.mkfifo),
    Kind("endless device.jpg", Cause.NOT_A_FILE, make=lambda path: path.symlink_to("/dev/zero")),
    Kind("blocking device.jpg", Cause.NOT_A_FILE, make=lambda path: path.symlink_to("/dev/tty")),
    Kind("memory://no/such/object.jpg", Cause.MISSING),
    # Bytes that are no image.
    Kind("no bytes.jpg", Cause.EMPTY, make=Path.touch),
    Kind("text.jpg", Cause.NOT_AN_IMAGE, make=content(b"just some words")),
    Kind("one byte.jpg", Cause.NOT_AN_IMAGE, make=content(b"\xff")),
    Kind("zeros.png", Cause.NOT_AN_IMAGE, make=content(bytes(5000))),
    Kind("error page.png", Cause.NOT_AN_IMAGE, make=content(HTML)),
    Kind("drawing.svg", Cause.NOT_AN_IMAGE, make=content(SVG)),
    Kind("drawing.jpg", Cause.NOT_AN_IMAGE, make=content(SVG)),
    Kind("program for ghostscript.jpg", Cause.NOT_AN_IMAGE, make=content(EPS)),
    Kind("document.jpg", Cause.NOT_AN_IMAGE, make=content(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n")),
    Kind("archive.jpg", Cause.NOT_AN_IMAGE, make=content(b"PK\x03\x04" + bytes(26))),
    Kind("pointer of git lfs.jpg", Cause.NOT_AN_IMAGE, make=content(b"version https://git-lfs.github.com/spec/v1\n")),
    Kind("format that is not read.jpg", Cause.NOT_AN_IMAGE, make=saved("TGA")),
    Kind("webp of sound.webp", Cause.NOT_AN_IMAGE, make=content(b"RIFF\x24\0\0\0WAVEfmt " + bytes(20))),
    # Images that end early.
    Kind("cut.jpg", Cause.TRUNCATED, make=cut("JPEG")),
    Kind("cut progressive.jpg", Cause.TRUNCATED, make=cut("JPEG", progressive=True)),
    Kind("cut.png", Cause.TRUNCATED, make=cut("PNG")),
    Kind("cut.webp", Cause.TRUNCATED, make=cut("WEBP")),
    Kind("cut lossless.webp", Cause.TRUNCATED, make=cut("WEBP", lossless=True)),
    Kind("cut.gif", Cause.TRUNCATED, make=cut("GIF")),
    Kind("cut.bmp", Cause.TRUNCATED, make=cut("BMP")),
    Kind("cut.ppm", Cause.TRUNCATED, make=cut("PPM")),
    Kind("cut.tif", Cause.TRUNCATED, make=cut("TIFF", 0.9)),
    Kind("start alone.jpg", Cause.TRUNCATED, make=content(encoded("JPEG")[:30])),
    Kind("start alone.png", Cause.TRUNCATED, make=content(encoded("PNG")[:20])),
    # Images that are broken otherwise.
    Kind("cut.avif", Cause.DAMAGED, make=cut("AVIF", 0.9)),  # its decoder does not say more
    Kind("bad checksum.png", Cause.DAMAGED, make=content(flipped(encoded("PNG"), 29))),
    Kind("bad compression.png", Cause.DAMAGED, make=content(after(encoded("PNG"), b"IDAT", b"\xff" * 50))),
    Kind("no tables.jpg", Cause.DAMAGED, make=content(encoded("JPEG").replace(b"\xff\xdb", b"\xff\xfe"))),
    Kind("garbage inside.webp", Cause.DAMAGED, make=content(after(encoded("WEBP"), b"VP8 ", b"\xff" * 40))),
    Kind("garbage inside.jp2", Cause.DAMAGED, make=content(after(encoded("JPEG2000"), b"jp2c", b"\xff" * 90))),
    Kind("no width.png", Cause.DAMAGED, make=content(png_of_size(0, 64))),
    # Sizes and values that cannot be used.
    Kind("bomb.png", Cause.TOO_LARGE, make=content(png_of_size(60000, 60000))),
    Kind("bomb just above the limit.png", Cause.TOO_LARGE, make=content(png_of_size(12000, 12000))),
    Kind("bomb.jpg", Cause.TOO_LARGE, make=content(jpeg_of_size(65500, 65500))),
    Kind("bomb.gif", Cause.TOO_LARGE, make=content(gif_of_size(65535, 65535))),
    Kind("text bomb.png", Cause.TOO_LARGE, make=content(with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9 << 20))))),
    Kind("eight gigabytes.jpg", Cause.TOO_LARGE, make=sparse),
    Kind("floats.tif", Cause.MODE, make=values(np.full((9, 9), np.nan, np.float32))),
    Kind("wide integers.tif", Cause.MODE, make=values(np.full((9, 9), 70000, np.int32))),
]  # fmt: skip

RECORDS = [
    # Unusual, and fine.
    Kind("null for a caption", None, record("plain.jpg", prompt=None)),
    Kind("blank caption", None, record("plain.jpg", prompt=" \n\t")),
    Kind("huge caption", None, record("plain.jpg", prompt="many words " * 100_000)),
    Kind("zero byte in the caption", None, record("plain.jpg", prompt="a\0b")),
    Kind("many scripts in the caption", None, record("plain.jpg", prompt="图 \u202e صورة \U0001f468\u200d\U0001f469")),
    Kind("several captions", None, record("plain.jpg", prompt=["one", ["two", 2], {"text": "three", "weight": 0.5}])),
    Kind("detailed caption", None, b'{"image_path": "plain.jpg", "super_high_quality_caption": "a picture"}'),
    Kind("nan for a width", None, b'{"path": "plain.jpg", "prompt": "a", "width": NaN, "height": Infinity}'),
    Kind("size below zero", None, record("plain.jpg", width=-96, height=-64)),
    Kind("size as text", None, record("plain.jpg", width="96", height=[64])),
    Kind("key twice, the last counts", None, b'{"path": "none.jpg", "path": "plain.jpg", "prompt": "a"}'),
    Kind("unknown keys", None, record("plain.jpg", **{"": None, "__class__": "os.system", "\u202e": [[]]})),
    Kind("space around", None, b" \t " + record("plain.jpg") + b" \r"),
    # No JSON.
    Kind("empty line", Cause.NOT_JSON, b""),
    Kind("words", Cause.NOT_JSON, b"a picture of a dog"),
    Kind("half an object", Cause.NOT_JSON, b'{"path": "plain.jpg", "pro'),
    Kind("two objects", Cause.NOT_JSON, record("plain.jpg") * 2),
    Kind("quotes of python", Cause.NOT_JSON, b"{'path': 'plain.jpg', 'prompt': 'a'}"),
    Kind("tab in a text", Cause.NOT_JSON, b'{"path": "plain.jpg", "prompt": "a\tb"}'),
    Kind("deeply nested", Cause.NOT_JSON, b"[" * 200_000),
    Kind("deeply nested value", Cause.NOT_JSON, b'{"path": "plain.jpg", "prompt": ' + b'{"a":' * 100_000),
    Kind("number of 9,999 digits", Cause.NOT_JSON, b'{"path": "plain.jpg", "width": ' + b"9" * 9999 + b"}"),
    Kind("zero bytes", Cause.NOT_JSON, bytes(60)),
    # No record.
    Kind("list", Cause.KEYS, b'["plain.jpg", "a picture"]'),
    Kind("text", Cause.KEYS, b'"plain.jpg"'),
    Kind("null", Cause.KEYS, b"null"),
    Kind("not a number", Cause.KEYS, b"NaN"),
    Kind("empty object", Cause.KEYS, b"{}"),
    Kind("no path", Cause.KEYS, b'{"prompt": "a picture"}'),
    Kind("keys in capitals", Cause.KEYS, b'{"PATH": "plain.jpg", "PROMPT": "a picture"}'),
    # Values of the wrong kind.
    Kind("number for a path", Cause.VALUE, record(path=7)),
    Kind("null for a path", Cause.VALUE, record(path=None)),
    Kind("list for a path", Cause.VALUE, record(path=["plain.jpg"])),
    Kind("empty path", Cause.VALUE, record("")),
    Kind("zero byte in the path", Cause.VALUE, record("plain.jpg\0.png")),
    Kind("number for a caption", Cause.VALUE, record("plain.jpg", prompt=7)),
    Kind("captions in captions", Cause.VALUE, record("plain.jpg", prompt=[["a", ["b", 1]]])),
    Kind("weight below zero", Cause.VALUE, record("plain.jpg", prompt=[["a", -1]])),
    Kind("weight is no number", Cause.VALUE, b'{"path": "plain.jpg", "prompt": [["a", NaN]]}'),
    Kind("unknown kind of address", Cause.VALUE, record("nostore://plain.jpg")),
    # Bytes and characters.
    Kind("latin 1", Cause.ENCODING, '{"path": "plain.jpg", "prompt": "ein Käse"}'.encode("latin-1")),
    Kind("invalid utf-8", Cause.ENCODING, b'{"path": "plain.jpg", "prompt": "\xc3\x28"}'),
    Kind("half of a pair in the caption", None, b'{"path": "plain.jpg", "prompt": "a \\ud800 b"}'),
    Kind("half of a pair in the path", Cause.ENCODING, b'{"path": "\\udfff.jpg", "prompt": "a"}'),
    # Fine, but for training on captions.
    Kind("no caption", Cause.CAPTION, b'{"path": "plain.jpg"}', needs_caption=True),
    Kind("no captions to choose from", Cause.CAPTION, record("plain.jpg", prompt=[]), needs_caption=True),
]  # fmt: skip

KINDS = IMAGES + RECORDS

_OF_CONTENT = {None, Cause.EMPTY, Cause.NOT_AN_IMAGE, Cause.TRUNCATED, Cause.DAMAGED, Cause.MODE}
