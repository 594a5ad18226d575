"""Handle calls that others may wait for than the request that was the first to cause them."""

from __future__ import annotations

import dataclasses
from uuid import uuid4

from ray.serve.context import _get_serve_request_context, _serve_request_context


def detach() -> None:
    """Let this task's calls belong to no request: Serve cancels those of a request with it.

    Its id in the logs stays. Ray Serve 2.60 has no public way to say this.
    """
    context = _get_serve_request_context()
    _serve_request_context.set(
        dataclasses.replace(context, _internal_request_id=uuid4().hex, cancel_on_parent_request_cancel=False)
    )
