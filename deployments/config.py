"""The one configuration tree: every tier, checked for itself and across the tiers before anything starts.

What replicas are told at construction is here. How many of them there are is Serve's own: the `deployments` section
of the config file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from deployments.admission import Limit
from deployments.borrowing.rule import BorrowMode
from deployments.http.auth import SOURCE
from engine.backends import AnyEngineConfig
from renderer.config import MIB, RendererConfig

PROJECT = Path(__file__).parent.parent

# What a renderer makes of a request depends on these: two tiers that differ in one would disagree on tokens or hashes.
SHAPING_FIELDS = (
    "model",
    "revision",
    "trust_remote_code",
    "max_model_len",
    "dtype",
    "image_backend",
    "mm_processor_kwargs",
    "limit_mm_per_prompt",
    "fetch",
    "max_image_bytes",
    "max_image_pixels",
    "trust_request_chat_template",
    "trust_request_mm_kwargs",
)
# What the tiers are told once, at the top.
SHARED_FIELDS = ("model", "revision", "max_model_len")

KeySource = Annotated[str, StringConstraints(pattern=SOURCE)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LaneConfig(_Frozen):
    """What may be under way for each replica of the tier that serves it. Routers have equal shares of it."""

    requests: int = Field(64, ge=0)
    media_bytes: int = Field(512 * MIB, ge=0, description="Encoded images; one request alone may exceed it.")

    def limit(self, replicas: int) -> Limit:
        return Limit(self.requests, self.media_bytes).times(replicas)


class AdmissionConfig(_Frozen):
    """Beyond these a request is refused at once, with a 503 that says when to come back."""

    render: LaneConfig = LaneConfig()
    generation: LaneConfig = LaneConfig()
    overflow: LaneConfig = Field(
        LaneConfig(requests=16, media_bytes=128 * MIB),
        description="Of an engine replica, generation included, up to which render-only requests may go there.",
    )
    retry_after_s: int = Field(1, ge=0)


class AffinityConfig(_Frozen):
    """How faithful a conversation is to its engine replica: see `affinity.LoadBound`."""

    factor: float = Field(1.5, ge=1, description="Of the mean load, up to which a favourite is kept.")
    idle: int = Field(8, ge=0, description="Requests under way up to which a replica counts as idle.")


class ReplicaConfig(_Frozen):
    """What every tier's deployment is told. `num_cpus` and `num_gpus` only schedule, they neither limit nor pin.

    The defaults of `num_cpus` let the whole application run twice on two cores, as a rolling update needs it.
    """

    num_cpus: float = Field(0.3, ge=0)
    num_gpus: float = Field(0, ge=0)
    max_ongoing_requests: int = Field(64, ge=1, description="Requests under way on one replica; others queue.")
    start_attempts: int = Field(3, ge=1, description="Failed starts after which the deployment is given up.")
    drain_s: float = Field(60, gt=0, description="How long a stopping replica may finish what it has.")


class RouterConfig(ReplicaConfig):
    """The HTTP edge and the way of a request through the tiers."""

    num_cpus: float = Field(0.1, ge=0)
    max_ongoing_requests: int = Field(1024, ge=1)
    drain_s: float = Field(600, gt=0)
    max_body_bytes: int = Field(256 * MIB, ge=1, description="Of one request body.")
    api_keys: tuple[KeySource, ...] = Field(
        (), description="Where the keys are that requests must carry (see `auth.KeyRing`); none: anybody may ask."
    )
    render_attempts: int = Field(3, ge=1, description="Replicas that a render-only request is tried on.")
    command_s: float = Field(600, gt=0, description="How long engine replicas may take to pause or to load weights.")
    failover_s: float = Field(30, ge=0, description="How long a generation is tried again once its replica is lost.")
    tier_wait_s: float = Field(120, ge=0, description="How long a starting router waits for the tiers' first replicas.")
    admission: AdmissionConfig = AdmissionConfig()
    overflow: bool = Field(
        False, description="Whether engine replicas serve render-only requests that find the render tier full."
    )


class HelpersConfig(_Frozen):
    """How a replica has its items processed by others of the render tier."""

    items_per_replica: int = Field(4, ge=1, description="Items under way at once for each render replica.")
    min_pixels: int = Field(400_000, ge=0, description="Of an image, below which `auto` keeps it: a hop costs more.")
    patience_s: float = Field(5, gt=0, description="After which an item that was sent away is processed here.")


class RenderTierConfig(ReplicaConfig):
    """Render replicas: warm processors, no engine."""

    fan_out_items: int = Field(64, ge=2, description="Of a request, from which on it is spread over the tier.")
    helpers: HelpersConfig = HelpersConfig()
    renderer: RendererConfig


class EngineTierConfig(ReplicaConfig):
    """Engine replicas: a renderer beside an engine, coupled through its sender cache."""

    num_cpus: float = Field(0.6, ge=0)
    drain_s: float = Field(600, gt=0, description="Longer than the longest stream that is allowed.")
    affinity: AffinityConfig = AffinityConfig()
    restart_s: float = Field(300, ge=0, description="How long the engine may be down before the replica is replaced.")
    borrow: BorrowMode = Field(
        "auto", description="Whether the render tier processes the items that the sender cache lacks: see `borrowing`."
    )
    helpers: HelpersConfig = HelpersConfig()
    renderer: RendererConfig
    engine: AnyEngineConfig

    @model_validator(mode="after")
    def _parts_agree(self) -> EngineTierConfig:
        for name in SHARED_FIELDS:
            ours, theirs = getattr(self.renderer, name), getattr(self.engine, name)
            if ours != theirs:
                raise ValueError(f"{name}: the renderer has {ours!r}, the engine beside it {theirs!r}")
        if self.max_ongoing_requests < self.engine.max_num_seqs:
            raise ValueError(
                f"max_ongoing_requests: {self.max_ongoing_requests} would never fill the engine's "
                f"max_num_seqs of {self.engine.max_num_seqs}"
            )
        return self


class GreenroomConfig(_Frozen):
    """One application: what its tiers serve, and how.

    `model`, `revision`, `max_model_len` and the options under `renderer` flow into both tiers; a tier may set any
    option of its own, except those that would make the tiers disagree on a prompt. `render: null` leaves the render
    tier out (engine replicas serve render-only requests with their readonly processors), `engine: null` the engine
    tier (generation is a 501).
    """

    # An error that repeats what it was given would write a key into logs and statuses, where one is misplaced.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: str = Field(min_length=1, description="Path of a local checkpoint, or a hub id.")
    revision: str | None = None
    max_model_len: int | None = Field(None, ge=1)
    served_model_names: tuple[str, ...] = Field((), description="Names that requests may use; the default is `model`.")
    renderer: dict[str, Any] = Field(default_factory=dict, description="Renderer options of both tiers.")
    router: RouterConfig = RouterConfig()
    render: RenderTierConfig | None
    engine: EngineTierConfig | None

    @model_validator(mode="before")
    @classmethod
    def _flow_down(cls, data: Any) -> Any:
        """Complete the tiers with what is said once at the top."""
        if not isinstance(data, Mapping) or not isinstance(data.get("model"), str):
            return {"render": None, "engine": None, **data} if isinstance(data, Mapping) else data
        data = {"render": {}, "engine": {}, **data}
        data["served_model_names"] = data.get("served_model_names") or (data["model"],)
        data["model"] = find_model(data["model"])
        shared = {name: data[name] for name in SHARED_FIELDS if data.get(name) is not None}
        parts = {"render": ("renderer",), "engine": ("renderer", "engine")}
        for tier, names in parts.items():
            if isinstance(data[tier], Mapping):
                data[tier] = _complete(data[tier], names, shared, data.get("renderer") or {})
        return data

    @model_validator(mode="after")
    def _tiers_agree(self) -> GreenroomConfig:
        if self.render is None and self.engine is None:
            raise ValueError("render and engine are both null: nothing would be served")
        if len(set(self.served_model_names)) < len(self.served_model_names):
            raise ValueError(f"served_model_names: repeated: {self.served_model_names}")
        renderers = [tier.renderer for tier in (self.render, self.engine) if tier is not None]
        for renderer in renderers:
            if renderer.model != self.model:
                raise ValueError(f"model: a tier has {renderer.model!r}, the application {self.model!r}")
        for name in SHAPING_FIELDS:
            values = [getattr(renderer, name) for renderer in renderers]
            if values[0] != values[-1]:
                raise ValueError(f"{name}: the render tier has {values[0]!r}, the engine tier {values[-1]!r}")
        return self


def find_model(model: str) -> str:
    """The absolute path of a local checkpoint, looked for here and in the project's folder; a hub id as it is.

    Replicas run in folders of their own, so a relative path would not reach them.
    """
    for folder in (Path.cwd(), PROJECT):
        path = folder / Path(model).expanduser()
        if model and path.is_dir():
            return str(path.resolve())
    return model


def _complete(
    tier: Mapping[str, Any], parts: tuple[str, ...], shared: Mapping[str, Any], renderer: Mapping[str, Any]
) -> dict[str, Any]:
    completed = dict(tier)
    for part in parts:
        own = dict(tier.get(part) or {})
        if isinstance(own.get("model"), str):
            own["model"] = find_model(own["model"])
        completed[part] = {**shared, **(renderer if part == "renderer" else {}), **own}
    return completed
