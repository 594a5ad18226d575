"""What a renderer is told: the model, its limits, its caches, its threads."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from renderer.fetch_config import FetchConfig

MIB = 1024 * 1024


class RendererConfig(BaseModel):
    """One renderer. Unknown fields are refused. Sizes are in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Path of a local checkpoint, or a hub id.")
    revision: str | None = None
    trust_remote_code: bool = False
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt and output together; None: the model's."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="What float tensors become on the wire; auto: the checkpoint's."
    )
    image_backend: Literal["torchvision", "pil"] = Field(
        "torchvision", description="Whose resampling is computed; neither needs torchvision installed."
    )
    mm_processor_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of the image processor.")
    limit_mm_per_prompt: dict[Literal["image"], int] = Field({"image": 64}, description="Items of one request.")
    fetch: FetchConfig = Field(FetchConfig(), description="Images that are named by an address.")
    max_image_bytes: int = Field(32 * MIB, ge=1, description="Of one encoded image, fetched or sent.")
    max_image_pixels: int = Field(64_000_000, ge=1, description="Of one decoded image.")
    max_uuid_length: int = Field(256, ge=1)
    trust_request_chat_template: bool = False
    trust_request_mm_kwargs: bool = False
    processor_cache_bytes: int = Field(1024 * MIB, ge=0, description="Of the readonly processor; 0: off.")
    media_threads: int = Field(2, ge=1, description="Threads that process items.")
    render_threads: int = Field(4, ge=1, description="Requests rendered at the same time.")
    warmup: Literal["strict", "lenient"] = Field(
        "strict", description="Whether a failed warm-up step keeps the replica from going live."
    )
