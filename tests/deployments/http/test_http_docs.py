"""docs/http.md names the routes that there are, and the settings of fetching with their defaults' places."""

from __future__ import annotations

import re

from fastapi.routing import APIRoute

from deployments.backends import LocalBackend
from deployments.bodies.strict import IGNORED
from deployments.config import PROJECT, GreenroomConfig
from deployments.front import Front
from deployments.http.routes import http_app
from deployments.operations import Operations
from deployments.records import Record
from deployments.rendering import RenderOnly
from renderer import errors
from renderer.fetch_config import FetchConfig
from renderer.image import FORMATS
from renderer.renderer import Renderer

PAGE = (PROJECT / "docs" / "http.md").read_text()
CONFIG = GreenroomConfig.model_validate({"model": "demo/model", "engine": None})


def test_every_route_is_on_the_page_and_no_other() -> None:
    assert CONFIG.render is not None
    renderer = Renderer(CONFIG.render.renderer)
    try:
        app = http_app(
            Operations(Front(CONFIG, LocalBackend(RenderOnly(renderer, Record("render")))), Record("render"))
        )
    finally:
        renderer.close()
    served = {
        f"{method} {route.path}" for route in app.routes if isinstance(route, APIRoute) for method in route.methods
    }
    table = PAGE[: PAGE.index("## Fields")]
    assert set(re.findall(r"`((?:GET|POST) /[^`]+)`", table)) == served


def test_every_setting_of_fetching_is_on_the_page() -> None:
    section = PAGE[PAGE.index("## Fetching") : PAGE.index("## Errors")]
    for name in FetchConfig.model_fields:
        assert name in ("user_agent", "keepalive_s") or f"`{name}`" in section, name


def test_every_ignored_field_is_on_the_page() -> None:
    for name in IGNORED:
        assert f"`{name}`" in PAGE, name


def test_every_type_of_error_is_on_the_page_with_its_status() -> None:
    table = PAGE[PAGE.index("## Errors") : PAGE.index("## Where it is better")]
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GreenroomError)
    ]
    for kind in kinds:
        if kind.status != 500:
            assert f"| {kind.status} | `{kind.type}` |" in table, kind


def test_every_format_is_on_the_page() -> None:
    section = PAGE[PAGE.index("### Images") : PAGE.index("### Generate requests")].upper().replace(" ", "")
    for form in FORMATS:
        assert form in section, form
