"""An average of a role's weights over its updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from posttrain.errors import CheckError


@dataclass
class Average:
    """``mean <- decay mean + (1 - decay) theta`` after each update, begun at the start's weights; of the masters.

    InstructGPT has 0.992 an iteration (Ouyang et al. 2022, appendix C.4), which is ``0.992 ** (1 / updates)`` an update. Of an
    adapter the factors are averaged, whose product is not the average of the products.

    Attributes:
        decay: from 0 (the newest weights) to below 1.
        role: whose weights.
        tensors: the average by name, from the optimiser's beginning on.
        into: parameters of another network that are the average after each update, such as the anchor of a KL penalty.
    """

    decay: float
    role: str = "policy"
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    into: Mapping[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])

    def begin(self, masters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Start at the weights."""
        self.tensors = {name: master.detach().clone() for name, master in masters[self.role].items()}

    def move(self, masters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in the weights after an update."""
        with torch.no_grad():
            for name, mean in self.tensors.items():
                mean.lerp_(masters[self.role][name].detach(), 1 - self.decay)
        self._follow()

    def named(self) -> dict[str, Tensor]:
        """The average by the flat names of a checkpoint."""
        return {f"{self.role}/average/{name}": mean for name, mean in self.tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore it from a checkpoint.

        Raises:
            CheckError: that one has no average.
        """
        for name, mean in self.named().items():
            if name not in tensors:
                raise CheckError(f"the checkpoint has no '{name}'; the run that wrote it kept no average of weights")
            mean.copy_(tensors[name])
        self._follow()

    def _follow(self) -> None:
        if self.into:
            self.put(self.into)

    def put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the role the averaged weights."""
        for name, mean in self.tensors.items():
            parameters[name].data.copy_(mean)
