"""However a file is made, its header is read or refused in little time; nothing that an encoder writes is refused."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import ExifTags, Image

from renderer import image_structure as structure
from renderer.errors import MediaError
from renderer.image import FORMATS, ImageLimits, decode, read_header
from tests.renderer.builders import encoded, picture

MIB = 1 << 20
LIMITS = ImageLimits(32 * MIB, 64_000_000)
BASE = picture(40, 24)
MANY = 100_000
XMP = b"http://ns.adobe.com/xap/1.0/\0"
ITXT = b"XML:com.adobe.xmp\0\0\0\0\0"
# Of CPU time: ten times what any of these takes, and a hundredth of what it took unbounded.
LONGEST_S = 0.15


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    plain = encoded(BASE)
    return plain[:33] + before + plain[33:-12] + after + plain[-12:]


def deflated(kind: bytes, keyword: bytes = b"x") -> bytes:
    return chunk(kind, keyword + b"\0\0" + zlib.compress(bytes(MIB - 1), 9))


def segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 255, marker, len(body) + 2) + body


def jpeg(header: bytes = b"", scans: bytes = b"", **options: Any) -> bytes:
    plain = encoded(BASE, "JPEG", **options)
    return plain[:2] + header + plain[2:-2] + scans + plain[-2:]


def gif(blocks: bytes) -> bytes:
    plain = encoded(BASE, "GIF")
    palette = 13 + (3 << ((plain[10] & 7) + 1))
    return plain[:palette] + blocks + plain[palette:]


def tags(entries: list[tuple[int, int, int, int]], values: bytes = b"") -> bytes:
    """A TIFF of these tags, whose values follow them."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + packed + bytes(4) + values


def tiff(*more: tuple[int, int, int], values: bytes = b"", height: int = 24) -> bytes:
    """A raw grayscale picture with more tags: number, type, count; their values are all in one place."""
    basic = [(256, 4, 1, 40), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (278, 3, 1, 1)]
    place = 8 + 2 + 12 * (len(basic) + len(more)) + 4
    return tags(basic + [(*entry, place) for entry in more], values)


def bigtiff(count: int) -> bytes:
    return struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, count) + struct.pack("<HHQQ", 300, 3, 1, 1) * count


def many_tags(count: int) -> bytes:
    return tags([(number, 3, 1, 1) for number in range(300, 300 + count)])


def many_fractions(count: int) -> bytes:
    return tags([(0x011A, 5, count, 26)], struct.pack("<II", 72, 1) * count)


def riff(chunks: bytes) -> bytes:
    plain = encoded(BASE, "WEBP", exif=b"Exif\0\0" + many_tags(1))
    return plain[:4] + struct.pack("<I", len(plain) + len(chunks) - 8) + plain[8:] + chunks


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I4s", len(body) + 8, kind) + body


def with_boxes(data: bytes, inside: bytes, boxes: bytes) -> bytes:
    """A file with more boxes at the end of one of its boxes."""
    start = data.index(inside) - 4
    end = start + int.from_bytes(data[start : start + 4], "big")
    return data[:start] + struct.pack(">I", end - start + len(boxes)) + data[start + 4 : end] + boxes + data[end:]


def jp2(boxes: bytes) -> bytes:
    return with_boxes(encoded(BASE.convert("L"), "JPEG2000", no_jp2=False), b"jp2h", boxes)


def avif(items: int) -> bytes:
    """An AVIF that lists more items than it has."""
    entries = [
        box(b"infe", struct.pack(">BBHHH4s", 2, 0, 0, 1000 + item, 0, b"mime") + b"\0\0") for item in range(items)
    ]
    data = bytearray(with_boxes(encoded(BASE, "AVIF"), b"iinf", b"".join(entries)))
    count, size = data.index(b"iinf") + 8, data.index(b"meta") - 4
    data[count : count + 2] = struct.pack(">H", int.from_bytes(data[count : count + 2], "big") + items)
    data[size : size + 4] = struct.pack(">I", int.from_bytes(data[size : size + 4], "big") + len(b"".join(entries)))
    return bytes(data)


def bmp(colours: int) -> bytes:
    plain = encoded(BASE.convert("P"), "BMP")
    return plain[:46] + struct.pack("<I", colours) + plain[50:]


PALETTE = box(b"colr", bytes(7)) + box(b"pclr", struct.pack(">HB", 65535, 0))
HOSTILE: dict[str, Callable[[], bytes]] = {
    "png.chunks": lambda: png(chunk(b"abCd") * MANY),
    "png.late-chunks": lambda: png(after=chunk(b"abCd") * MANY),
    "png.empty-pixel-chunks": lambda: png(after=chunk(b"IDAT") * MANY),
    "png.profiles": lambda: png(deflated(b"iCCP") * 100),
    "png.compressed-texts": lambda: png(deflated(b"zTXt") * 60),
    "png.compressed-exif": lambda: png(deflated(b"zTXt", b"Raw profile type exif") * 15),
    "png.palettes": lambda: png(chunk(b"PLTE", bytes(3)) * 100),
    "png.exif-tags": lambda: png(chunk(b"eXIf", many_tags(60_000))),
    "png.exif-as-text": lambda: png(
        chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + many_tags(60_000).hex().encode())
    ),
    "jpeg.segments": lambda: jpeg(segment(0xFE) * MANY),
    "jpeg.fill": lambda: jpeg(b"\xff" * MIB),
    "jpeg.junk": lambda: jpeg(b"\xff\xd9" + b"\0" * MIB),
    "jpeg.photoshop": lambda: jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 50),
    "jpeg.tables": lambda: jpeg(segment(0xDB, (b"\0" + bytes(range(1, 65))) * 1000) * 50),
    "jpeg.exif-segments": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(65000)) * 300),
    "jpeg.exif-tags": lambda: jpeg(segment(0xE1, b"Exif\0\0" + many_tags(5000))),
    "jpeg.exif-fractions": lambda: jpeg(segment(0xE1, b"Exif\0\0" + many_fractions(4000))),
    "gif.extensions": lambda: gif(b"!\xfe\0" * MANY),
    "gif.comment": lambda: gif(b"!\xfe" + b"\1a" * MANY + b"\0"),
    "tif.tags": lambda: tiff(*((number, 3, 1) for number in range(400, 60_000))),
    "tif.big-tags": lambda: bigtiff(MANY),
    "tif.strips": lambda: tiff((273, 4, MIB), values=bytes(4 * MIB), height=2**20),
    "tif.fractions": lambda: tiff((273, 4, 1), (282, 5, MIB // 2), values=struct.pack("<II", 72, 1) * (MIB // 2)),
    "webp.chunks": lambda: riff(b"abcd\0\0\0\0" * MANY),
    "webp.exif-tags": lambda: encoded(BASE, "WEBP", exif=b"Exif\0\0" + many_tags(60_000)),
    "bmp.colours": lambda: bmp(65536),
    "ppm.comments": lambda: b"P6\n" + b"#\n" * MANY + b"1 1 255\n\0\0\0",
    "ppm.comment": lambda: b"P6\n#" + b"a" * MIB + b"\n1 1 255\n\0\0\0",
}
if "JPEG2000" in FORMATS:
    HOSTILE["jp2.boxes"] = lambda: jp2(box(b"abcd") * MANY)
    HOSTILE["jp2.palettes"] = lambda: jp2(PALETTE * 100)
if "AVIF" in FORMATS:
    HOSTILE["avif.items"] = lambda: avif(20_000)
    HOSTILE["avif.exif-tags"] = lambda: encoded(BASE, "AVIF", exif=b"Exif\0\0" + many_tags(60_000))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_of_very_many_parts_is_refused_at_once(name: str) -> None:
    data = HOSTILE[name]()
    start = time.process_time()
    with pytest.raises(MediaError, match=r"it has more than \d+ ") as caught:
        read_header(data, 3, LIMITS)
    assert time.process_time() - start < LONGEST_S
    assert caught.value.index == 3


WITHIN: dict[str, Callable[[], bytes]] = {
    "png.chunks": lambda: png(chunk(b"abCd", bytes(99)) * 300, chunk(b"abCd") * 90),
    "png.pixel-chunks": lambda: png(after=chunk(b"IDAT", bytes(64)) * 16_000),
    "png.compressed-texts": lambda: png(deflated(b"zTXt") * 16),
    "png.compressed-xmp": lambda: png(deflated(b"zTXt", b"xmp") * 2),
    "png.large-text": lambda: png(chunk(b"iTXt", b"x\0\0\0\0\0" + b"x" * (30 * MIB))),
    "jpeg.segments": lambda: jpeg(segment(0xFE, bytes(60_000)) * 380),
    "jpeg.profile": lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000)) * 255),
    "jpeg.fill": lambda: jpeg(b"\xff" * 500),
    "jpeg.photoshop": lambda: jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 1000)),
    "jpeg.exif": lambda: jpeg(segment(0xE1, b"Exif\0\0" + many_fractions(1000))),
    "gif.comment": lambda: gif(b"!\xfe" + (b"\x4b" + bytes(75)) * 4000 + b"\0"),
    "tif.strips": lambda: tiff((273, 4, 4096), values=bytes(4 * 4096), height=4096),
    "webp.chunks": lambda: riff(b"abcd\0\0\0\0" * 4000),
    "ppm.comment": lambda: b"P6\n#" + b"a" * 1900 + b"\n40 24 255\n\0\0\0",
}
if "AVIF" in FORMATS:
    WITHIN["avif.items"] = lambda: avif(2000)


@pytest.mark.parametrize("name", WITHIN)
def test_a_header_within_the_bounds_is_read_at_once(name: str) -> None:
    data = WITHIN[name]()
    start = time.process_time()
    header = read_header(data, 0, LIMITS)
    assert time.process_time() - start < LONGEST_S
    assert header.size.width == 40


def empty_scans(count: int) -> bytes:
    return (segment(0xDA, bytes((1, 1, 0, 1, 63, 0)))) * count


@pytest.mark.parametrize("options", [{}, {"optimize": True}])
def test_a_progressive_jpeg_of_very_many_scans_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MediaError, match="more than 64 scans"):
        read_header(jpeg(scans=empty_scans(60), progressive=True, **options), 0, LIMITS)
    data = jpeg(scans=empty_scans(40), progressive=True, **options)
    assert decode(data, read_header(data, 0, LIMITS), 0).shape == (24, 40, 3)


def test_scans_cannot_hide_behind_an_end_that_is_in_another_segment() -> None:
    hidden = segment(0xFE, b"\xff\xd9") + empty_scans(60)
    with pytest.raises(MediaError, match="more than 64 scans"):
        read_header(jpeg(scans=hidden, progressive=True), 0, LIMITS)
    with pytest.raises(MediaError, match="segments between its scans"):
        read_header(jpeg(scans=segment(0xFE) * 400 + empty_scans(60), progressive=True), 0, LIMITS)


@pytest.mark.parametrize("progressive", [True, False])
def test_what_follows_a_jpeg_is_none_of_its_scans(progressive: bool) -> None:
    film = jpeg(progressive=progressive) + empty_scans(500)
    assert read_header(film, 0, LIMITS) == read_header(jpeg(), 0, LIMITS)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_bytes_behind_the_end_of_a_file_are_no_parts_of_it(kind: str) -> None:
    data = encoded(BASE, kind) + bytes(4 * MIB)
    header = read_header(data, 0, LIMITS)
    assert decode(data, header, 0).shape == (24, 40, 3)


def test_a_jpeg_in_one_scan_may_hold_what_looks_like_scans() -> None:
    thumbnails = segment(0xED, empty_scans(500))
    assert read_header(jpeg(thumbnails, progressive=True), 0, LIMITS) == read_header(jpeg(), 0, LIMITS)


@pytest.mark.parametrize("order", ["II", "MM"])
def test_a_compressed_tiff_may_have_more_strips_than_a_raw_one(order: str) -> None:
    basic = {256: 40, 257: 8000, 258: 8, 262: 1, 278: 1}
    mark = "<" if order == "II" else ">"

    def strips(compression: int) -> bytes:
        numbers = sorted({**basic, 259: compression}.items())
        packed = b"".join(struct.pack(mark + "HHIHxx", number, 3, 1, value) for number, value in numbers)
        offsets = struct.pack(mark + "HHII", 273, 4, 8000, 8 + 2 + 12 * 7 + 4)
        head = struct.pack(mark + "HIH", 42, 8, 7)
        return order.encode() + head + packed + offsets + bytes(4) + bytes(4 * 8000)

    assert read_header(strips(5), 0, LIMITS).size.height == 8000
    with pytest.raises(MediaError, match="more than 4096 values"):
        read_header(strips(1), 0, LIMITS)


def xmp(orientation: int) -> bytes:
    return b'<x tiff:Orientation="%d"/>' % orientation


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"iTXt", ITXT + xmp(6))),
        png(after=chunk(b"iTXt", ITXT + xmp(6))),
        png(chunk(b"eXIf", tags([(0x0112, 3, 1, 6)])), chunk(b"eXIf", tags([(0x0112, 3, 1, 3)]))),
        png(chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + tags([(0x0112, 3, 1, 6)]).hex().encode())),
        jpeg(segment(0xE1, XMP + xmp(6))),
        jpeg(segment(0xE1, b"Exif\0\0" + tags([(0x0112, 3, 1, 6)]))),
    ],
)
def test_an_orientation_is_found_where_pillow_finds_it(data: bytes) -> None:
    assert Image.open(io.BytesIO(data)).getexif()[ExifTags.Base.Orientation] == 6
    assert read_header(data, 0, LIMITS).orientation == 6


def test_a_file_is_read_in_a_bounded_number_of_pieces() -> None:
    file = structure.MeteredFile(bytes(9999))
    for _ in range(structure.MAX_READS):
        assert len(file.read(1)) == 1
    with pytest.raises(structure.TooManyPartsError, match="more than 2048 pieces"):
        file.read(1)
