import math
import random

import numpy as np
import pytest

from demo.scenes import CELL, COLORS, SHAPES, Background, Scene, Shape, draw, label_cells, make_scene

SIZES = [(112, 112), (224, 224), (336, 140), (448, 448)]


def scenes(count: int) -> list[Scene]:
    return [make_scene(random.Random(seed), *SIZES[seed % len(SIZES)]) for seed in range(count)]


def test_the_same_seed_draws_the_same_picture() -> None:
    for first, second in zip(scenes(30), scenes(30), strict=True):
        assert first == second
        assert draw(first).tobytes() == draw(second).tobytes()


def test_another_seed_draws_another_picture() -> None:
    assert len({draw(scene).tobytes() for scene in scenes(40)}) == 40


def test_shapes_lie_inside_and_apart() -> None:
    for scene in scenes(200):
        for index, shape in enumerate(scene.shapes):
            assert shape.radius <= shape.x <= scene.width - shape.radius
            assert shape.radius <= shape.y <= scene.height - shape.radius
            for other in scene.shapes[index + 1 :]:
                assert math.hypot(shape.x - other.x, shape.y - other.y) > shape.radius + other.radius


def test_every_number_of_shapes_every_kind_and_every_colour_occur() -> None:
    drawn = scenes(300)
    assert {len(scene.shapes) for scene in drawn} == {0, 1, 2, 3, 4, 5}
    assert {shape.kind for scene in drawn for shape in scene.shapes} == set(SHAPES)
    assert {shape.color for scene in drawn for shape in scene.shapes} == set(COLORS)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_middle_of_a_shape_has_its_colour_at_any_size(kind: str) -> None:
    shape = Shape(kind, "red", (255, 0, 0), 100, 120, 50)
    scene = Scene(224, 224, (shape,), Background("plain", (255, 255, 255), (255, 255, 255)))
    for side in (64, 224, 900):
        pixels = np.asarray(draw(scene, (side, side)))
        assert tuple(pixels[round(120 * side / 224), round(100 * side / 224)]) == (255, 0, 0)
        assert tuple(pixels[0, 0]) == (255, 255, 255)


def test_cells_are_labelled_by_what_covers_them() -> None:
    shape = Shape("square", "green", (0, 128, 0), 2.5 * CELL, 1.5 * CELL, 1.4 * CELL)
    scene = Scene(8 * CELL, 4 * CELL, (shape,), Background("plain", (0, 0, 0), (0, 0, 0)))
    covering, centres = label_cells(scene)
    label = 1 + 8 * SHAPES.index("square") + list(COLORS).index("green")
    assert covering.reshape(4, 8)[1, 2] == centres.reshape(4, 8)[1, 2] == label
    assert covering.reshape(4, 8)[3, 7] == 0
    assert (centres > 0).sum() == 1
