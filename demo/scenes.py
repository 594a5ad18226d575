"""Seeded pictures of coloured shapes.

A scene is laid out for the size that the image processor resizes to (`Scene.width` x `Scene.height`
pixels, multiples of 28) and can be drawn at any other size: all rules about what is visible and what is
ambiguous are rules about what the model sees.
"""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

CELL = 28  # pixels along one side of the area that becomes one image token
SHAPES = ("circle", "square", "triangle", "star")
COLORS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (255, 0, 0), (205, 25, 25), (230, 45, 55)),
    "green": ((0, 128, 0), (0, 128, 0), (34, 160, 50), (0, 225, 20)),
    "blue": ((0, 0, 255), (0, 0, 255), (35, 65, 205), (60, 110, 235)),
    "yellow": ((255, 255, 0), (255, 255, 0), (250, 228, 30)),
    "orange": ((255, 165, 0), (255, 165, 0), (255, 138, 10)),
    "purple": ((128, 0, 128), (128, 0, 128), (150, 45, 200), (160, 32, 240)),
    "black": ((0, 0, 0), (0, 0, 0), (18, 18, 18)),
    "white": ((255, 255, 255), (255, 255, 255), (240, 240, 240)),
}
GROUNDS: tuple[RGB, ...] = (
    (255, 255, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (211, 211, 211), (173, 216, 230),
    (245, 245, 220), (240, 240, 240), (64, 64, 64), (32, 32, 32), (135, 206, 235), (255, 192, 203),
)  # fmt: skip
SINGLE_COUNTS = (0.03, 0.31, 0.29, 0.20, 0.13, 0.04)  # share of pictures with 0, 1, ... 5 shapes
MULTI_COUNTS = (0.02, 0.50, 0.25, 0.15, 0.08)  # the same, where a conversation has several pictures
_LARGEST = (0.42, 0.42, 0.27, 0.23, 0.20, 0.17)  # largest radius / short side, by number of shapes
_SMALLEST_PX = 10.0


@dataclass(frozen=True)
class Shape:
    """One shape; centre and circumradius in pixels of the scene, angle in radians."""

    kind: str
    color: str
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float = 0.0
    stretch: float = 1.0  # width / height, for triangles
    border: RGB | None = None


@dataclass(frozen=True)
class Background:
    """What lies behind the shapes: `style` from one colour to the other."""

    style: str  # plain, gradient, noise or smooth
    first: RGB
    second: RGB
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; `width` and `height` are the pixels that the model sees."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    background: Background
    grain: int = 0  # largest change of a channel, 0-255
    jpeg: int = 0  # quality, 0: not compressed

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.height // CELL, self.width // CELL


def make_scene(rng: random.Random, width: int, height: int, counts: tuple[float, ...] = SINGLE_COUNTS) -> Scene:
    """Draw a scene for a picture that is `width` x `height` pixels when the model sees it."""
    wanted = rng.choices(range(len(counts)), counts)[0]
    shapes = _place(rng, width, height, _kinds_and_colors(rng, wanted))
    background = _background(rng, [shape.rgb for shape in shapes])
    grain = rng.randint(4, 20) if rng.random() < 0.12 else 0
    jpeg = rng.randint(40, 92) if rng.random() < 0.08 else 0
    return Scene(width, height, shapes, background, grain, jpeg)


def draw(scene: Scene, size: tuple[int, int] | None = None) -> Image.Image:
    """Draw a scene as RGB at `size` (width, height), by default at the size that the model sees."""
    width, height = size or (scene.width, scene.height)
    image = _draw_background(scene.background, width, height)
    pencil = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw_shape(pencil, shape, width / scene.width, height / scene.height, shape.rgb)
    if scene.grain:
        image = _with_grain(image, scene.grain, scene.background.seed)
    if scene.jpeg:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=scene.jpeg)
        image = Image.open(stream).convert("RGB")
    return image


def label_cells(scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class of every cell, flat in reading order: what covers it, and whose centre lies in it.

    0 is nothing; 1 + 8 * shape + colour otherwise.
    """
    rows, columns = scene.cells
    covering = np.zeros((rows, columns), np.int64)
    centres = np.zeros((rows, columns), np.int64)
    mask = Image.new("L", (columns * 4, rows * 4))
    pencil = ImageDraw.Draw(mask)
    for index, shape in enumerate(scene.shapes, 1):
        _draw_shape(pencil, shape, 4 / CELL, 4 / CELL, index, border=False)
    owners = np.asarray(mask).reshape(rows, 4, columns, 4)
    most = np.full((rows, columns), 2)
    for index, shape in enumerate(scene.shapes, 1):
        label = 1 + len(COLORS) * SHAPES.index(shape.kind) + list(COLORS).index(shape.color)
        area = (owners == index).sum((1, 3))
        covering[area > most] = label
        most = np.maximum(most, area)
        centres[int(shape.y // CELL), int(shape.x // CELL)] = label
    return covering.reshape(-1), centres.reshape(-1)


def _kinds_and_colors(rng: random.Random, count: int) -> list[tuple[str, str]]:
    if count <= len(SHAPES) and rng.random() < 0.7:
        return list(zip(rng.sample(SHAPES, count), rng.sample(list(COLORS), count), strict=True))
    kinds = rng.sample(SHAPES, rng.randint(1, len(SHAPES)))
    colors = rng.sample(list(COLORS), rng.randint(2, max(2, count)))
    return [(rng.choice(kinds), rng.choice(colors)) for _ in range(count)]


def _place(rng: random.Random, width: int, height: int, looks: list[tuple[str, str]]) -> tuple[Shape, ...]:
    """Place the shapes without overlap; gives up the last of them where the picture is too full."""
    short = min(width, height)
    for attempt in range(30):
        placed: list[Shape] = []
        for kind, color in looks[: len(looks) - attempt // 10]:
            shape = _try_to_place(rng, width, height, _radius(rng, short, len(looks), attempt), placed, kind, color)
            if shape is None:
                break
            placed.append(shape)
        else:
            return tuple(placed)
    return tuple(placed)


def _radius(rng: random.Random, short: int, count: int, attempt: int) -> float:
    smallest = max(_SMALLEST_PX, 0.10 * short)
    largest = max(smallest, _LARGEST[count] * short)
    return smallest + (largest - smallest) * rng.random() * 0.9**attempt


def _try_to_place(
    rng: random.Random, width: int, height: int, radius: float, others: list[Shape], kind: str, color: str
) -> Shape | None:
    for _ in range(25):
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if not others and rng.random() < 0.1:
            x, y = width / 2, height / 2
        if all(math.hypot(x - o.x, y - o.y) > 1.05 * (radius + o.radius) + 2 for o in others):
            return _decorate(rng, Shape(kind, color, _jitter(rng, color), x, y, radius))
    return None


def _jitter(rng: random.Random, color: str) -> RGB:
    base = rng.choice(COLORS[color])
    if rng.random() < 0.4:
        return base
    red, green, blue = (min(255, max(0, channel + rng.randint(-15, 15))) for channel in base)
    return red, green, blue


def _decorate(rng: random.Random, shape: Shape) -> Shape:
    angle = rng.uniform(0, 2 * math.pi) if shape.kind != "circle" and rng.random() < 0.4 else 0.0
    stretch = rng.uniform(0.8, 1.25) if shape.kind == "triangle" and rng.random() < 0.5 else 1.0
    border: RGB | None = None
    if rng.random() < 0.15:
        border = rng.choice(((0, 0, 0), (255, 255, 255), (90, 90, 90)))
    return Shape(shape.kind, shape.color, shape.rgb, shape.x, shape.y, shape.radius, angle, stretch, border)


def _distance(a: RGB, b: RGB) -> float:
    return math.dist(a, b)


def _background(rng: random.Random, shown: list[RGB]) -> Background:
    style = rng.choices(("plain", "gradient", "noise", "smooth"), (40, 20, 17, 23))[0]
    least = rng.uniform(95, 115)
    best, best_distance = ((128, 128, 128), (128, 128, 128)), -1.0
    for _ in range(60):
        first, second = _ground(rng), _ground(rng)
        if style in ("plain", "noise"):
            second = first
        middle = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
        near = min((_distance(a, b) for a in shown for b in (first, middle, second)), default=999.0)  # type: ignore[arg-type]
        if near > best_distance:
            best, best_distance = (first, second), near
        if near >= least:
            break
    return Background(style, *best, seed=rng.getrandbits(32))


def _ground(rng: random.Random) -> RGB:
    if rng.random() < 0.5:
        return rng.choice(GROUNDS)
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _draw_background(background: Background, width: int, height: int) -> Image.Image:
    if background.style == "plain":
        return Image.new("RGB", (width, height), background.first)
    rng = np.random.default_rng(background.seed)
    if background.style == "noise":
        plain = Image.new("RGB", (width, height), background.first)
        return _with_grain(plain, int(rng.integers(10, 36)), background.seed)
    mix = _ramp(rng) if background.style == "gradient" else _clouds(rng)
    first, second = np.array(background.first, np.float32), np.array(background.second, np.float32)
    small = first + (second - first) * mix[..., None]
    return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def _ramp(rng: np.random.Generator) -> NDArray[np.float32]:
    """A linear gradient in a random direction, 32 x 32, from 0 to 1."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, 32)
    ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return np.asarray((ramp - ramp.min()) / np.ptp(ramp), np.float32)


def _clouds(rng: np.random.Generator) -> NDArray[np.float32]:
    """Three octaves of smooth noise, 32 x 32, from 0 to 1."""
    total = np.zeros((32, 32), np.float32)
    for size, height in ((4, 1.0), (8, 0.5), (16, 0.25)):
        octave = Image.fromarray(rng.random((size, size), np.float32))
        total += height * np.asarray(octave.resize((32, 32), Image.Resampling.BILINEAR))
    return np.asarray((total - total.min()) / np.ptp(total), np.float32)


def _with_grain(image: Image.Image, amplitude: int, seed: int) -> Image.Image:
    rng = np.random.default_rng([seed, amplitude])
    pixels = np.asarray(image).astype(np.int16)
    pixels += rng.integers(-amplitude, amplitude + 1, pixels.shape, np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _draw_shape(
    pencil: ImageDraw.ImageDraw, shape: Shape, scale_x: float, scale_y: float, fill: RGB | int, border: bool = True
) -> None:
    x, y, radius = shape.x * scale_x, shape.y * scale_y, shape.radius * math.sqrt(scale_x * scale_y)
    outline = shape.border if border else None
    thickness = max(1, round(0.06 * radius))
    if shape.kind == "circle":
        box = (x - radius, y - radius, x + radius, y + radius)
        pencil.ellipse(box, fill=fill, outline=outline, width=thickness if outline else 0)
        return
    corners = [(x + radius * dx, y + radius * dy) for dx, dy in _corners(shape)]
    pencil.polygon(corners, fill=fill, outline=outline, width=thickness)


def _corners(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a polygon in the unit circle, y down."""
    if shape.kind == "square":
        radii, start = [1.0] * 4, math.pi / 4
    elif shape.kind == "triangle":
        radii, start = [1.0] * 3, -math.pi / 2
    else:
        radii, start = [1.0, 0.42] * 5, -math.pi / 2
    corners = []
    for index, radius in enumerate(radii):
        angle = start + shape.angle + 2 * math.pi * index / len(radii)
        x = radius * math.cos(angle)
        corners.append((x * min(1.0, shape.stretch), radius * math.sin(angle) / max(1.0, shape.stretch)))
    return corners
