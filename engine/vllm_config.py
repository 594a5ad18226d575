"""What an engine is told whose backend is a vLLM in the replica's process."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MIB = 1024 * 1024

# What vLLM's own options would undo: how items reach the engine, and which caches there are.
_OWN = frozenset(
    {
        "model",
        "revision",
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_device_do_normalize",
        "mm_tensor_ipc",
        "disable_log_stats",
        "enable_prompt_embeds",
    }
)
_FIELDS = {"kv_cache_memory_bytes": "kv_cache_bytes"}


class VllmEngineConfig(BaseModel):
    """One engine. Unknown fields are refused. Sizes are in bytes.

    Whatever of vLLM's options has no field of its own goes into `engine_args`, by the names of `AsyncEngineArgs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["vllm"]
    model: str = Field(description="Path of a local checkpoint, or a hub id.")
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt and output together; None: the model's."
    )
    max_num_seqs: int = Field(64, ge=1, description="Requests in one step; the others wait.")
    max_num_batched_tokens: int | None = Field(None, ge=16, description="Tokens of one step; None: vLLM's choice.")
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1, description="Share of memory; None: vLLM's choice.")
    kv_cache_bytes: int | None = Field(None, ge=1, description="None: what gpu_memory_utilization leaves.")
    mm_cache_bytes: int = Field(4096 * MIB, ge=0, description="Of the receiver cache; 0: items always cross whole.")
    enforce_eager: bool = Field(False, description="No compilation: a quick start and slower steps.")
    engine_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engine_args")
    @classmethod
    def _not_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        own = sorted(_OWN & set(args))
        if own:
            raise ValueError(f"{', '.join(own)}: decided by Greenroom, not an option")
        named = sorted(name for name in args if name in cls.model_fields or name in _FIELDS)
        if named:
            raise ValueError(f"{', '.join(named)}: has a field of its own; set it there")
        return args

    def vllm_args(self) -> dict[str, Any]:
        """Keyword arguments of vLLM's `AsyncEngineArgs`."""
        args = {
            "model": self.model,
            "tokenizer": self.model,
            "revision": self.revision,
            "tokenizer_revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "enforce_eager": self.enforce_eager,
            # Greenroom's prompts hold images alone; memory that profiling sets aside for others would be lost.
            "limit_mm_per_prompt": {"video": 0, "audio": 0},
            "mm_processor_cache_gb": self.mm_cache_bytes / 2**30,
            "mm_processor_cache_type": "lru",
            # Pixels cross as the renderer makes them: raw bytes for the models that normalise on their device.
            "mm_device_do_normalize": True,
            # The library of the embedded engine; a model that could put blanks anywhere may never come to an end.
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            "disable_log_stats": True,
        }
        return {name: value for name, value in args.items() if value is not None} | self.engine_args
