"""Verdicts on budgets, from tables."""

from bench.verdicts import verdicts


def tables(ratio: float, times: float) -> dict[str, list[dict[str, object]]]:
    return {
        "overhead": [{"request": "text", "cpu": 1.0, "pil cpu": 1.0, "/ pil": 0.5, "/ torchvision": ratio}],
        "shortcuts": [
            {"what": "layout", "cpu": 1.0, "pil times": 90.0, "torchvision times": times},
            {"what": "cache hit", "cpu": 1.0, "pil times": 90.0, "torchvision times": 21.0},
        ],
        "pixel path": [
            {"image": "640x480", "JPEG to tensors": 2.0},
            {"image": "1920x1080", "JPEG to tensors": 26.0},
        ],
        "warm-up": [
            {"start": "warm", "what": "640x480", "ratio": 1.1},
            {"start": "warm", "what": "text", "ratio": 9.0},
            {"start": "cold", "what": "640x480", "ratio": 5.0},
        ],
    }


def test_the_worst_figure_decides() -> None:
    held = {row["budget"]: (row["at"], row["held"]) for row in verdicts(tables(1.2, 24.0))}
    assert held["caching off / bare processor"] == (1.2, "no")
    assert held["layout, times"] == (24.0, "no")
    assert held["cache hit, times"] == (21.0, "yes")
    assert held["640x480 JPEG to tensors, ms"] == (2.0, "yes")
    assert held["1920x1080 JPEG to tensors, ms"] == (26.0, "no")


def test_warm_up_is_judged_by_images_after_a_warm_start() -> None:
    (row,) = (row for row in verdicts(tables(1.0, 25.0)) if row["budget"] == "first after warm-up / steady")
    assert (row["at"], row["held"]) == (1.1, "yes")
