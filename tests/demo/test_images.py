import pytest
from PIL import Image

from demo.draw_images import IMAGES_FOLDER, SKETCHES, draw_sketch
from demo.evaluate import Demo


def test_the_folder_holds_the_sketches_and_is_small() -> None:
    assert {path.name for path in IMAGES_FOLDER.iterdir()} == set(SKETCHES)
    assert sum(path.stat().st_size for path in IMAGES_FOLDER.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", SKETCHES)
def test_the_demo_image_is_described_rightly(demo: Demo, name: str) -> None:
    with Image.open(IMAGES_FOLDER / name) as image:
        assert image.size == SKETCHES[name].size
        assert demo.ask("Describe the picture.", image.convert("RGB")) == SKETCHES[name].description


@pytest.mark.parametrize("name", [name for name in SKETCHES if name.endswith(".png")])
def test_the_png_is_what_the_script_draws(name: str) -> None:
    with Image.open(IMAGES_FOLDER / name) as image:
        assert image.tobytes() == draw_sketch(SKETCHES[name]).tobytes()
