"""What a renderer reads of a checkpoint: configurations, tokenizer, image processor; never weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoImageProcessor
from transformers.utils import cached_file

from renderer.config import RendererConfig
from renderer.errors import ConfigError
from renderer.tokenizer import Tokenizer
from renderer.wire import FloatType


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model, by path or hub id, as Hugging Face's classes read it."""

    name: str
    revision: str | None
    trust_remote_code: bool
    config: Any
    tokenizer: Tokenizer

    @classmethod
    def load(cls, config: RendererConfig) -> Checkpoint:
        """Read configuration and tokenizer.

        Raises:
            ConfigError: There is no such checkpoint, or it is not readable.
        """
        source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        try:
            hf_config = AutoConfig.from_pretrained(config.model, **source)
            tokenizer = Tokenizer.load(config.model, config.revision, config.trust_remote_code)
        except ConfigError:
            raise
        except Exception as error:  # Each of a checkpoint's files has a reader with errors of its own.
            raise ConfigError(f"cannot read the checkpoint {config.model!r}: {error}", "model") from error
        return cls(config.model, config.revision, config.trust_remote_code, hf_config, tokenizer)

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def max_model_len(self) -> int:
        """Tokens that the model was made for.

        Raises:
            ConfigError: The configuration does not say.
        """
        length = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if length is None:
            raise ConfigError(f"{self.name} does not say how long a prompt may be: set max_model_len", "max_model_len")
        return int(length)

    def float_type(self, dtype: Literal["auto"] | FloatType) -> FloatType:
        """What an engine of this dtype computes in; "auto" is the checkpoint's own, and bfloat16 for float32."""
        if dtype != "auto":
            return dtype
        own = getattr(self.config, "dtype", None) or getattr(self.config.get_text_config(), "dtype", None)
        return "float16" if str(own).removeprefix("torch.") == "float16" else "bfloat16"

    def image_processor(self) -> Any:
        """The checkpoint's image processor, of Hugging Face's Pillow backend: it needs no torchvision.

        Raises:
            ConfigError: There is none, or its settings contradict each other.
        """
        source = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return AutoImageProcessor.from_pretrained(self.name, backend="pil", **source)
        except Exception as error:  # As many classes as there are families, each with errors of its own.
            raise ConfigError(f"cannot read the image processor of {self.name!r}: {error}", "model") from error

    def generation_defaults(self) -> Mapping[str, Any]:
        """`generation_config.json` as it stands, empty without one."""
        return self._json("generation_config.json")

    def chat_template(self) -> str | Mapping[str, str] | None:
        """The chat template, or several by name; None without one."""
        own: str | dict[str, str] | None = self.tokenizer.hf.chat_template
        return own or self._json("chat_template.json").get("chat_template")

    def _json(self, name: str) -> Mapping[str, Any]:
        path = cached_file(
            self.name,
            name,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content: Mapping[str, Any] = {} if path is None else json.loads(Path(path).read_text())
        return content
