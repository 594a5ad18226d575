"""Muon: momentum whose update is orthogonalised, for the matrices of the model."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon:
    """Steps all matrices of one shape together. `lr` can be set between steps."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        self.lr, self._momentum, self._decay = lr, momentum, decay
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            groups[tuple(matrix.shape)].append(matrix)
        self._groups = list(groups.values())
        self._moments = [torch.zeros_like(torch.stack(group)).detach() for group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group, moment in zip(self._groups, self._moments, strict=True):
            gradient = torch.stack([m.grad if m.grad is not None else torch.zeros_like(m) for m in group])
            moment.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(moment, self._momentum))
            rows, columns = group[0].shape
            step = self.lr * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * self._decay)
            torch._foreach_add_(group, list(update.to(moment.dtype).unbind(0)), alpha=-step)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, by five Newton-Schulz steps; in bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
