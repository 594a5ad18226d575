"""The parts that an image file is made of, counted before a decoder walks them.

Decoders walk headers part by part, some in Python and some in quadratic time: a file of megabytes of empty parts would
take them minutes to open. The bounds lie far beyond what encoders write.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

MAX_READS = 2048
MAX_GIF_READS = 8192  # its metadata come in pieces of some 75 bytes
MAX_PARTS = 400
MAX_EXIF_SEGMENTS = 16
# Each goes over all coefficients: a dozen bytes are 0.1 s of work at 64 million pixels. Encoders write up to 18.
MAX_SCANS = 64
MAX_FRAMES = 4096
MAX_PIXEL_CHUNKS = 16384  # 2 KB each at 32 MB, where encoders write 8 KB and more
MAX_INFLATED = 16  # up to 1 MB each
MAX_TELLING, MAX_TELLING_INFLATED = 16, 2
MAX_TABLE_BYTES = 64 * 1024
MAX_RESOURCES = 1024
MAX_TAGS = 256
MAX_VALUES = 32768  # of one tag, which has one for each strip or tile
MAX_RAW_VALUES = 4096  # where each strip becomes an object: 8 KB each at 32 MB
MAX_FRACTIONS = 1024
MAX_COLOURS = 1024
MAX_DESCRIBED_BYTES = 64 * 1024

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
_PNG_TELLING = (b"IHDR", b"PLTE", b"tRNS", b"eXIf")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TELLING_KEYWORDS = (b"exif", b"Raw profile type exif", b"xmp", b"XML:com.adobe.xmp")
_TIFF_SIGNATURES = (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+")
# Of a TIFF tag: the types whose values stay bytes, and those of two numbers each.
_BYTES, _FRACTIONS = (1, 2, 7), (5, 10)
_COMPRESSION = 259
# Of a JPEG: every marker that a length follows, and the end.
_MARKER = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
_SCAN, _END, _APP1, _APP13 = 0xDA, 0xD9, 0xE1, 0xED
_START_OF_SCAN = b"\xff\xda"
_TABLES = (0xDB, 0xC4)
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # frames that one scan of all components completes
_MAX_JUNK = 64 * 1024  # before a segment; a `MeteredFile` gives less
_EXIF = b"Exif\0\0"
_BOXES_OF_BOXES = (b"meta", b"iprp", b"ipco", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"jp2h", b"res ")
_BOXES_OF_DATA = (b"mdat", b"idat", b"jp2c", b"colr", b"uuid", b"xml ", b"free", b"skip", bytes(4))


class TooManyPartsError(Exception):
    """A file has more parts of a kind than any that an encoder writes."""


class MeteredFile(io.BytesIO):
    """A file that gives `MAX_READS` pieces, or `MAX_GIF_READS`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._most = self._left = MAX_GIF_READS if data.startswith(b"GIF") else MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises TooManyPartsError beyond the bound."""
        self._left -= 1
        if self._left < 0:
            raise TooManyPartsError(f"it has more than {self._most} pieces in its header")
        return io.BytesIO.read(self, size)


def check_structure(data: bytes) -> None:
    """Refuse a file whose header takes long to read, or whose pixels take long out of all proportion to them.

    What is counted is what decoders do beyond reading from a `MeteredFile`. What is malformed passes: a decoder finds
    out.

    Raises:
        TooManyPartsError: It has more parts of a kind than any that an encoder writes.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(b"RIFF"):
        _check_riff(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    elif data.startswith(_TIFF_SIGNATURES):
        _check_tags(data)
    elif data[4:8] in (b"ftyp", b"jP  "):
        _check_boxes(data)


def check_exif(exif: bytes) -> None:
    """Refuse EXIF data whose first directory has very many tags or values.

    Raises:
        TooManyPartsError: It has.
    """
    _check_tags(exif.removeprefix(_EXIF).removeprefix(_EXIF))


def png_header(data: bytes) -> bytes:
    """A PNG of the chunks that tell size, mode and orientation. EXIF data may stand after the pixels.

    Raises:
        TooManyPartsError: More tell them than any encoder writes.
    """
    kept, inflated, has_exif = [PNG_SIGNATURE], 0, False
    for kind, start, end in _png_chunks(data):
        if kind in _PNG_PIXELS and has_exif:
            break
        keyword = data[start + 8 : data.find(b"\0", start + 8, start + 88)] if kind in _PNG_TEXTS else None
        if kind not in _PNG_TELLING and keyword not in _TELLING_KEYWORDS:
            continue
        kept.append(data[start:end])
        inflated += _is_inflated(data, kind, start)
        has_exif = has_exif or kind == b"eXIf" or keyword == b"exif"
        _check(len(kept), MAX_TELLING, "chunks of its size and orientation")
        _check(inflated, MAX_TELLING_INFLATED, "compressed chunks of its orientation")
    return b"".join([*kept, _PNG_END])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of every chunk up to the end mark, with length and checksum."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, position, position + 12 + length
        if kind == b"IEND":
            break
        position += 12 + length


def _check(number: int, most: int, what: str) -> None:
    if number > most:
        raise TooManyPartsError(f"it has more than {most} {what}")


def _check_png(data: bytes) -> None:
    pixels = others = inflated = 0
    for kind, start, _ in _png_chunks(data):
        if kind in _PNG_PIXELS:
            pixels += 1
            _check(pixels, MAX_PIXEL_CHUNKS, "chunks of pixels")
            continue
        others += 1
        inflated += _is_inflated(data, kind, start)
        _check(others, MAX_PARTS, "chunks beside its pixels")
        _check(inflated, MAX_INFLATED, "compressed chunks beside its pixels")


def _is_inflated(data: bytes, kind: bytes, start: int) -> bool:
    """Whether reading a chunk inflates it; an `iTXt` chunk has a flag after its keyword."""
    flag = data.find(b"\0", start + 8) + 1
    return kind in (b"iCCP", b"zTXt") or (kind == b"iTXt" and data[flag : flag + 1] != b"\0")


def _check_jpeg(data: bytes) -> None:
    segments, pixels = _jpeg_segments(data)
    exif = [body for marker, body in segments if marker == _APP1 and body.startswith(_EXIF)]
    resources = sum(body.count(b"8BIM") for marker, body in segments if marker == _APP13)
    _check(sum(len(body) for marker, body in segments if marker in _TABLES), MAX_TABLE_BYTES, "bytes of tables")
    _check(resources, MAX_RESOURCES, "Photoshop resources")
    _check(len(exif), MAX_EXIF_SEGMENTS, "EXIF segments")
    check_exif(b"".join(body.removeprefix(_EXIF) for body in exif))
    frame = next((body for marker, body in reversed(segments) if marker in _SEQUENTIAL), b"")
    if segments and segments[-1][1][:1] != frame[5:6] and data.count(_START_OF_SCAN, pixels) >= MAX_SCANS:
        _check_scans(data, pixels)


def _jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Marker and body of each segment up to the first scan, and where its pixels begin."""
    segments: list[tuple[int, bytes]] = []
    position = 2
    while found := _MARKER.search(data, position, position + _MAX_JUNK):
        marker, position = found[1][0], found.end()
        if marker == _END:
            continue
        start, position = position + 2, _segment_end(data, position)
        segments.append((marker, data[start:position]))
        _check(len(segments), MAX_PARTS, "segments")
        if marker == _SCAN:
            break
    return segments, position


def _check_scans(data: bytes, position: int) -> None:
    """Count the scans that follow the first; what looks like one in another segment, or after the end, is none."""
    scans = parts = 1
    while (found := _MARKER.search(data, position)) and found[1][0] != _END:
        position = _segment_end(data, found.end())
        scans += found[1][0] == _SCAN
        parts += 1
        _check(scans, MAX_SCANS, "scans")
        _check(parts, MAX_PARTS, "segments between its scans")


def _segment_end(data: bytes, length_at: int) -> int:
    return length_at + max(2, int.from_bytes(data[length_at : length_at + 2], "big"))


def _check_riff(data: bytes) -> None:
    chunks, position = 0, 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= end:
        chunks += 1
        _check(chunks, MAX_FRAMES, "chunks")
        (length,) = struct.unpack_from("<I", data, position + 4)
        position += 8 + length + length % 2


def _check_bmp(data: bytes) -> None:
    header, colours = data[14:18], data[46:50]
    if int.from_bytes(header, "little") >= 40:
        _check(int.from_bytes(colours, "little"), MAX_COLOURS, "colours")


def _check_tags(data: bytes) -> None:
    order, big = (">" if data.startswith(b"MM") else "<"), data[2:3] == b"+"
    tag = struct.Struct(order + ("HHQH6x" if big else "HHLH2x"))
    try:
        (start,) = struct.unpack_from(order + ("8xQ" if big else "4xL"), data)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    except (struct.error, OverflowError):
        return
    _check(count, MAX_TAGS, "tags")
    start += 8 if big else 2
    whole = data[start : start + count * tag.size]
    tags = list(tag.iter_unpack(whole[: len(whole) // tag.size * tag.size]))
    compression = next((value for number, _, _, value in tags if number == _COMPRESSION), 1)
    most = MAX_RAW_VALUES if compression in (0, 1) else MAX_VALUES
    _check(max((values for _, kind, values, _ in tags if kind not in _BYTES), default=0), most, "values of one tag")
    _check(sum(values for _, kind, values, _ in tags if kind in _FRACTIONS), MAX_FRACTIONS, "fractions")


def _check_boxes(data: bytes) -> None:
    """AVIF and JPEG 2000. What lists the items and the samples of an AVIF is gone over once for each of them."""
    described = colours = 0
    for parts, (kind, start, size) in enumerate(_boxes(data), 1):
        described += 0 if kind in _BOXES_OF_BOXES or kind in _BOXES_OF_DATA else size
        colours += int.from_bytes(data[start : start + 2], "big") if kind == b"pclr" else 0
        _check(parts, MAX_PARTS, "boxes")
        _check(described, MAX_DESCRIBED_BYTES, "bytes in boxes that are not data")
        _check(colours, MAX_COLOURS, "colours")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the body and size of every box, those in boxes too."""
    spans = [(0, len(data))]
    while spans:
        start, end = spans.pop()
        if start + 8 > end:
            continue
        size, kind = struct.unpack_from(">I4s", data, start)
        body = start + (16 if size == 1 else 8)
        if size == 1:
            size = int.from_bytes(data[start + 8 : body], "big")
        stop = end if size == 0 else min(start + size, end)
        if stop < body:
            continue
        spans.append((stop, end))
        if kind in _BOXES_OF_BOXES:
            spans.append((body + (4 if kind == b"meta" else 0), stop))
        yield kind, body, stop - start
