"""Training batches: conversations as token ids, pictures as patches. Batch i depends on (seed, i) alone."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from demo.conversations import Conversation, Talk, Turn
from demo.scenes import CELL, Scene, draw, label_cells
from demo.tokenizer import IDS, load_tokenizer

Grid = tuple[int, int]  # rows and columns of image tokens


@dataclass(frozen=True)
class BatchSize:
    """Limits of one training batch."""

    conversations: int = 256
    image_tokens: int = 14_000
    grids: int = 2
    largest: int = 256  # image tokens of one picture


@dataclass
class Batch:
    """One step's tensors. Image features are ordered by grid, then by picture, then row by row."""

    grids: list[Grid]
    patches: list[Tensor]  # per grid: uint8 (pictures, 4 * rows * columns, 588)
    tokens: Tensor  # (batch, length), padded on the right
    positions: Tensor  # (3, batch, length): time, row, column
    places: Tensor  # index of each image token in the flat batch
    covering: Tensor  # class of what covers each image token
    centres: Tensor  # class of the shape whose centre lies in it
    coordinates: Tensor  # (image tokens, 2): row and column
    asked: Tensor  # flat index of the token before each answer token
    wanted: Tensor  # each answer token
    weights: Tensor  # its weight in the loss
    answers: Tensor  # which answer it belongs to
    kinds: list[str]  # of each answer
    conversations: int

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in pinned host memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        changes: dict[str, Any] = {"patches": [change(patches) for patches in self.patches], **tensors}
        return replace(self, **changes)


class Batches(torch.utils.data.Dataset[Batch]):
    """Training batches by index."""

    def __init__(self, seed: int | str, steps: int, size: BatchSize | None = None) -> None:
        self._seed, self._steps, self._size = seed, steps, size or BatchSize()
        self._encoder: Encoder | None = None

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        if self._encoder is None:
            self._encoder = Encoder(load_tokenizer())
        return make_batch(random.Random(f"{self._seed}/{index}"), self._encoder, self._size)


@dataclass
class Row:
    """One conversation as token ids; `blocks` says where each picture's image tokens begin."""

    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    answers: list[tuple[str, int, int]] = field(default_factory=list)  # kind, first token, past the last

    def copy(self) -> "Row":
        """A row that can grow on its own."""
        return Row(list(self.ids), list(self.blocks), list(self.answers))


class Encoder:
    """Turns conversations into rows, token for token what the chat template gives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cached = lru_cache(maxsize=4096)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def start(self, system: str) -> Row:
        """A row that holds the system message."""
        return Row(list(self._cached(f"<|im_start|>system\n{system}<|im_end|>\n")))

    def add(self, row: Row, turn: Turn, cells: list[int], numbered: bool) -> None:
        """Append a turn whose new pictures have `cells` image tokens each."""
        marks = [f"Picture {len(row.blocks) + n}: " if numbered else "" for n in range(1, len(cells) + 1)]
        pictures = "".join(f"{mark}<|vision_start|><|image_pad|><|vision_end|>" for mark in marks)
        text = turn.question.text
        body = text + turn.joint + pictures if turn.text_first else pictures + turn.joint + text
        coming = iter(cells)
        for token in self._encode(f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"):
            if token == IDS["<|image_pad|>"]:
                row.blocks.append(len(row.ids))
                row.ids += [token] * next(coming)
            else:
                row.ids.append(token)
        begin = len(row.ids)
        row.ids += [*self._encode(turn.question.answer), IDS["<|im_end|>"]]
        row.answers.append((turn.question.kind, begin, len(row.ids)))
        row.ids += self._cached("\n")

    def encode(self, conversation: Conversation) -> Row:
        """The whole conversation."""
        row, shown = self.start(conversation.system), 0
        for turn in conversation.turns:
            new = conversation.scenes[shown : shown + turn.pictures]
            shown += turn.pictures
            self.add(row, turn, [math.prod(scene.cells) for scene in new], conversation.numbered)
        return row


def draw_grid(rng: random.Random, largest: int) -> Grid:
    """Rows and columns of image tokens: 16 to `largest` in all, log-uniform, as the image processor makes them."""
    while True:
        tokens = math.exp(rng.uniform(math.log(16), math.log(largest + 1)))
        aspect = math.exp(rng.gauss(0, 0.35))
        rows, columns = round(math.sqrt(tokens / aspect)), round(math.sqrt(tokens * aspect))
        if rows and columns and 16 <= rows * columns <= largest:
            return rows, columns


def patches_of(image: Image.Image) -> NDArray[np.uint8]:
    """Patches (4 * rows * columns, 588) of a picture whose sides are multiples of 28."""
    width, height = image.size
    rows, columns = height // CELL, width // CELL
    pixels = np.asarray(image).reshape(rows, 2, 14, columns, 2, 14, 3)
    return pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * 4, 588)


def picture(rng: random.Random, scene: Scene) -> Image.Image:
    """The scene as the model sees it; half of the time it is drawn at another size first."""
    if rng.random() < 0.5:
        return draw(scene)
    factor = rng.uniform(0.5, 1.7)
    small = draw(scene, (max(8, round(scene.width * factor)), max(8, round(scene.height * factor))))
    return small.resize((scene.width, scene.height), Image.Resampling.BICUBIC)


def make_batch(rng: random.Random, encoder: Encoder, size: BatchSize) -> Batch:
    """Draw one batch: 70 % of them with one picture a conversation, the others with two or three."""
    several = rng.random() < 0.3
    grids = [draw_grid(rng, min(size.largest, 160) if several else size.largest) for _ in range(size.grids)]
    length = _length(rng, grids, several)
    rows: list[Row] = []
    seen: list[tuple[int, Scene, int, int]] = []  # grid, scene, row, first token
    left = size.image_tokens
    while len(rows) < size.conversations and left > 0:
        chosen = _choose_grids(rng, len(grids), several)
        row, conversation = _converse(rng, encoder, [grids[n] for n in chosen], length)
        seen += [(n, s, len(rows), b) for n, s, b in zip(chosen, conversation.scenes, row.blocks, strict=False)]
        left -= sum(math.prod(scene.cells) for scene in conversation.scenes)
        rows.append(row)
    return collate(rng, grids, rows, seen)


def _length(rng: random.Random, grids: list[Grid], several: bool) -> int:
    """Tokens that every row is filled up to: equal rows need little padding."""
    image_tokens = max(rows * columns for rows, columns in grids)
    return image_tokens * (2 if several else 1) + rng.randint(80, 200)


def _choose_grids(rng: random.Random, count: int, several: bool) -> list[int]:
    if not several:
        return [] if rng.random() < 0.08 else [rng.randrange(count)]
    return [rng.randrange(count) for _ in range(rng.choice((2, 2, 3)))]


def _converse(rng: random.Random, encoder: Encoder, grids: list[Grid], length: int) -> tuple[Row, Conversation]:
    talk = Talk(rng, [(columns * CELL, rows * CELL) for rows, columns in grids])
    row, shown = encoder.start(talk.system), 0
    for _ in range(1 if rng.random() < 0.1 else 8):
        turn = talk.grow()
        new = talk.scenes[shown : shown + turn.pictures]
        shown += turn.pictures
        longer = row.copy()
        encoder.add(longer, turn, [math.prod(scene.cells) for scene in new], talk.numbered)
        if len(longer.ids) > length and row.answers:
            talk.withdraw()
            break
        row = longer
    return row, talk.finished()


def collate(rng: random.Random, grids: list[Grid], rows: list[Row], seen: list[tuple[int, Scene, int, int]]) -> Batch:
    """Stack rows and pictures; `seen` lists each picture's grid, scene, row and first image token."""
    seen = sorted(seen, key=lambda item: item[0])
    length = -(-max(len(row.ids) for row in rows) // 8) * 8
    tokens = np.full((len(rows), length), IDS["<|endoftext|>"], np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.ids)] = row.ids
    labels = [label_cells(scene) for _, scene, _, _ in seen]
    empty = [np.zeros(0, np.int64)]
    coordinates = [_coordinates(grids[grid]) for grid, _, _, _ in seen] + [np.zeros((0, 2))]
    places = [r * length + first + np.arange(math.prod(grids[g])) for g, _, r, first in seen]
    blocks: list[list[tuple[int, Grid]]] = [[] for _ in rows]
    for grid, _, index, first in sorted(seen, key=lambda item: item[3]):
        blocks[index].append((first, grids[grid]))
    answers = [(kind, i * length + a, i * length + b) for i, row in enumerate(rows) for kind, a, b in row.answers]
    spans = [np.arange(a - 1, b - 1) for _, a, b in answers]
    asked = np.concatenate(spans)
    return Batch(
        grids=grids,
        patches=[_stack(rng, grid, [s for g, s, _, _ in seen if g == n]) for n, grid in enumerate(grids)],
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.stack([positions(length, block) for block in blocks], 1)),
        places=torch.from_numpy(np.concatenate(places + empty)),
        covering=torch.from_numpy(np.concatenate([covering for covering, _ in labels] + empty)),
        centres=torch.from_numpy(np.concatenate([centres for _, centres in labels] + empty)),
        coordinates=torch.from_numpy(np.concatenate(coordinates)),
        asked=torch.from_numpy(asked),
        wanted=torch.from_numpy(tokens.reshape(-1)[asked + 1]),
        weights=torch.from_numpy(np.concatenate([np.full(len(s), len(s) ** -0.5, np.float32) for s in spans])),
        answers=torch.from_numpy(np.concatenate([np.full(len(s), n) for n, s in enumerate(spans)])),
        kinds=[kind for kind, _, _ in answers],
        conversations=len(rows),
    )


def _stack(rng: random.Random, grid: Grid, scenes: list[Scene]) -> Tensor:
    patches = np.empty((len(scenes), 4 * math.prod(grid), 588), np.uint8)
    for index, scene in enumerate(scenes):
        patches[index] = patches_of(picture(rng, scene))
    return torch.from_numpy(patches)


def _coordinates(grid: Grid) -> NDArray[np.float64]:
    return np.stack(np.divmod(np.arange(math.prod(grid)), grid[1]), 1).astype(np.float64)


def positions(length: int, blocks: list[tuple[int, Grid]]) -> NDArray[np.int64]:
    """Multimodal rotary positions (3, length): a picture advances time by its longer side only."""
    result = np.empty((3, length), np.int64)
    token, position = 0, 0
    for first, (rows, columns) in blocks:
        result[:, token:first] = position + np.arange(first - token)
        position += first - token
        token = first + rows * columns
        row, column = np.divmod(np.arange(rows * columns), columns)
        result[:, first:token] = position + np.stack([np.zeros_like(row), row, column])
        position += max(rows, columns)
    result[:, token:] = position + np.arange(length - token)
    return result
