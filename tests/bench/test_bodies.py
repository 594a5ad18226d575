"""The bodies that `bench.serve` sends."""

import json

from bench.bodies import CASES, Case
from deployments.bodies.chat import RenderChatBody
from deployments.bodies.strict import parse
from renderer.conversation import media_of
from renderer.image import ImageLimits, read_header

LIMITS = ImageLimits(1 << 30, 1 << 30)


def images(body: bytes) -> list[bytes]:
    request = parse(RenderChatBody, body).request()
    return [image.data or b"" for image in media_of(request)]


def test_every_case_is_a_body_that_greenroom_reads() -> None:
    for case in CASES:
        body = case.bodies()()
        headers = [read_header(picture, 0, LIMITS) for picture in images(body)]
        assert [(header.size.width, header.size.height) for header in headers] == list(case.sizes)
        assert json.loads(body).get("mm_payload") == (None if case.tensors else "none")


def test_images_are_new_in_every_body_unless_the_case_repeats_them() -> None:
    sizes = ((64, 48), (64, 48))
    new, same = Case("new", sizes).bodies(), Case("same", sizes, again=True).bodies()
    assert len({*images(new()), *images(new())}) == 4
    assert images(same()) == images(same())
    assert len(set(images(same()))) == 2
