"""Draws the demo images: `python -m demo.draw_images` writes them to `demo/images`.

Each file name says what the picture shows. `tests/demo/test_images.py` asks the demo model about every one.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.evaluate import cells_of
from demo.scenes import CELL, RGB, Background, Scene, Shape, draw

IMAGES_FOLDER = Path(__file__).parent / "images"
_SKY = Background("smooth", (235, 240, 245), (150, 190, 225), 4)
_DUSK = Background("gradient", (70, 80, 110), (190, 150, 140), 11)
_PAPER = Background("noise", (236, 230, 214), (236, 230, 214), 5)
_STONE = Background("smooth", (120, 120, 125), (165, 160, 150), 8)
_WHITE = Background("plain", (255, 255, 255), (255, 255, 255))


@dataclass(frozen=True)
class Spot:
    """A shape; centre as shares of the picture's sides, radius as a share of the shorter one."""

    color: str
    kind: str
    x: float
    y: float
    radius: float
    rgb: RGB


@dataclass(frozen=True)
class Sketch:
    """One demo image: `size` in pixels (width, height) and what the model says when asked to describe it."""

    size: tuple[int, int]
    background: Background
    spots: tuple[Spot, ...]
    description: str
    grain: int = 0


SKETCHES: dict[str, Sketch] = {
    "red_circle.png": Sketch(
        (224, 224), _WHITE, (Spot("red", "circle", 0.5, 0.5, 0.32, (255, 0, 0)),), "The picture shows a red circle."
    ),
    "no_shape.png": Sketch((224, 224), _PAPER, (), "I see no shape."),
    "green_triangle_and_yellow_star.png": Sketch(
        (448, 448),
        _DUSK,
        (
            Spot("green", "triangle", 0.28, 0.62, 0.2, (0, 190, 20)),
            Spot("yellow", "star", 0.7, 0.3, 0.18, (255, 255, 0)),
        ),
        "The picture shows a green triangle and a yellow star.",
    ),
    "two_blue_circles_and_a_red_star.png": Sketch(
        (448, 336),
        _WHITE,
        (
            Spot("blue", "circle", 0.2, 0.35, 0.17, (0, 0, 255)),
            Spot("blue", "circle", 0.5, 0.7, 0.2, (0, 0, 255)),
            Spot("red", "star", 0.8, 0.3, 0.19, (255, 0, 0)),
        ),
        "The picture shows a blue circle, a blue circle and a red star.",
    ),
    "orange_star_640x480.jpg": Sketch(
        (640, 480),
        _STONE,
        (Spot("orange", "star", 0.6, 0.45, 0.3, (255, 165, 0)),),
        "The picture shows an orange star.",
        8,
    ),
    "yellow_square_480x640.webp": Sketch(
        (480, 640),
        _DUSK,
        (Spot("yellow", "square", 0.45, 0.6, 0.3, (250, 228, 30)),),
        "The picture shows a yellow square.",
        6,
    ),
    "blue_square_1280x960.jpg": Sketch(
        (1280, 960),
        _SKY,
        (Spot("blue", "square", 0.35, 0.55, 0.28, (20, 40, 220)),),
        "The picture shows a blue square.",
        6,
    ),
    "purple_circle_black_square_and_white_triangle_1920x1080.jpg": Sketch(
        (1920, 1080),
        Background("gradient", (110, 150, 120), (170, 175, 130), 3),
        (
            Spot("purple", "circle", 0.2, 0.4, 0.2, (128, 0, 128)),
            Spot("black", "square", 0.5, 0.65, 0.2, (10, 10, 10)),
            Spot("white", "triangle", 0.8, 0.4, 0.22, (250, 250, 250)),
        ),
        "The picture shows a purple circle, a black square and a white triangle.",
        4,
    ),
}


def draw_sketch(sketch: Sketch) -> Image.Image:
    """The picture at its own size."""
    rows, columns = cells_of(*sketch.size)
    width, height = columns * CELL, rows * CELL
    shapes = tuple(
        Shape(spot.kind, spot.color, spot.rgb, spot.x * width, spot.y * height, spot.radius * min(width, height))
        for spot in sketch.spots
    )
    scene = Scene(width, height, shapes, sketch.background, sketch.grain)
    return draw(scene, sketch.size)


def main() -> None:
    """Write all demo images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES_FOLDER)
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, sketch in SKETCHES.items():
        draw_sketch(sketch).save(folder / name, quality=82, optimize=True)


if __name__ == "__main__":
    main()
