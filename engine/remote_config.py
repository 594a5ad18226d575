"""What an engine is told that runs elsewhere, behind HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class RemoteEngineConfig(BaseModel):
    """vLLM servers of one model, started with `--enable-scale-out`. Unknown fields are refused. Times are in seconds.

    The servers normalise pixels as vLLM does by default: without `--no-mm-device-do-normalize`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["remote"]
    model: str = Field(description="Path of a local checkpoint, or a hub id; only its configuration is read.")
    revision: str | None = None
    urls: tuple[str, ...] = Field(min_length=1, description="Base URLs, such as http://10.0.0.7:8000.")
    served_model_name: str | None = Field(None, description="What the servers call the model; None: their only one.")
    api_key: SecretStr | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="What float tensors become.")
    max_model_len: int | None = Field(None, ge=1, description="None: what the servers say.")
    max_num_seqs: int = Field(64, ge=1, description="Requests that keep all servers busy.")
    connect_timeout_s: float = Field(5, gt=0)
    read_timeout_s: float = Field(600, gt=0, description="Longest silence of a server that works on a request.")
    start_timeout_s: float = Field(120, gt=0, description="How long to wait for the first server.")

    @field_validator("urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an http or https address")
        if len(set(urls)) < len(urls):
            raise ValueError("an address is repeated")
        return tuple(url.rstrip("/") for url in urls)
