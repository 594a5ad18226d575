"""What an engine is told: the model, where it runs, and how much it may hold."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MIB = 1024 * 1024


class EngineConfig(BaseModel):
    """One engine. Unknown fields are refused. Sizes are in bytes unless they say otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Path of a local checkpoint, or a hub id.")
    revision: str | None = None
    weights: str | None = Field(
        None, description="Path of another checkpoint of the same shape, whose weights take the place of the model's."
    )
    backend: Literal["transformers"] = "transformers"
    device: str = Field("auto", description="auto: cuda where there is one, else cpu.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="auto: float32 on the CPU.")
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt and output together; None: the model's."
    )
    max_num_seqs: int = Field(32, ge=1, description="Requests in one step; the others wait.")
    max_num_batched_tokens: int | None = Field(
        None, ge=16, description="Tokens of one step, prefill chunks included; None: 2048, on the CPU 256."
    )
    block_size: int = Field(16, ge=1, description="Tokens of a KV block.")
    kv_cache_bytes: int = Field(256 * MIB, ge=1)
    mm_cache_bytes: int = Field(512 * MIB, ge=0, description="Of the receiver cache, and so of the sender cache.")
    encoder_cache_bytes: int = Field(256 * MIB, ge=0)
    threads: int = Field(1, ge=1, description="CPU threads of the core's forward passes.")
    stall_s: float = Field(
        120, gt=0, description="How long the core may leave a question unanswered; then another takes its place."
    )
