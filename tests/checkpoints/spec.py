"""What a checkpoint of the tests is made of, and how its folder is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from tests.checkpoints.vocabulary import Form, make_tokenizer

Ids = Callable[[str], int]
TEMPLATES = Path(__file__).parent / "templates"
# Ten times the usual spread: greedy output of the random models then varies, and depends on the picture.
SPREAD = 0.2


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A family's special tokens under their true names, and what each is for.

    Attributes:
        first, last: Special tokens with the lowest and the highest ids.
        bos, eos, pad, unk: Roles that every tokenizer may have.
        roles: Further roles by attribute name (`image_token`, `boi_token`, ...).
        add_bos: Whether text gets `bos` when special tokens are asked for.
    """

    form: Form
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    add_bos: bool = False

    def make(self) -> Tokenizer:
        return make_tokenizer(self.form, self.first, self.last, self.bos if self.add_bos else None)

    def settings(self, model_max_length: int) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.unk}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self.add_bos,
            "extra_special_tokens": dict(self.roles),
            **named,
        }


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One family.

    Attributes:
        model: Name of the model's class in transformers.
        config: Makes the configuration, given the ids of tokens and the vocabulary's size.
        image_processor: preprocessor_config.json, as the public model has it; None for a text model.
        processor: processor_config.json.
        template: File of the chat template; None where the public model has none.
        generation: generation_config.json, its token ids as tokens.
        dtype: Of the weights.
    """

    family: str
    model: str
    tokenizer: TokenizerSpec
    config: Callable[[Ids, int], transformers.PreTrainedConfig]
    max_length: int
    template: str | None
    image_processor: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def write(self, folder: Path) -> None:
        """Write the whole checkpoint: the same bytes every time."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer.make()
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", self.tokenizer.settings(self.max_length))
        if self.image_processor is not None:
            _write_json(folder / "preprocessor_config.json", self.image_processor)
        if self.processor is not None:
            _write_json(folder / "processor_config.json", self.processor)
        if self.template is not None:
            (folder / "chat_template.jinja").write_text((TEMPLATES / self.template).read_text().rstrip("\n"))
        ids = _ids_of(tokenizer)
        self._write_model(folder, ids, tokenizer.get_vocab_size())
        _write_json(folder / "generation_config.json", _with_ids(self.generation, ids))

    def _write_model(self, folder: Path, ids: Ids, entries: int) -> None:
        config = self.config(ids, entries)
        config.dtype = self.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config)
        model.to(self.dtype).save_pretrained(folder)


def _ids_of(tokenizer: Tokenizer) -> Ids:
    vocabulary = tokenizer.get_vocab()
    return vocabulary.__getitem__


def _with_ids(generation: Mapping[str, Any], ids: Ids) -> dict[str, Any]:
    """Replace tokens by their ids in the fields that hold ids."""
    return {key: _id(value, ids) if key.endswith("_token_id") else value for key, value in generation.items()}


def _id(value: str | list[str], ids: Ids) -> int | list[int]:
    return ids(value) if isinstance(value, str) else [ids(token) for token in value]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
