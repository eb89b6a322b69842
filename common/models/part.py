"""Some rows or some columns of a tensor: what one of several devices reads of it."""

from typing import Any, NamedTuple

import torch


class Part(NamedTuple):
    """Places `first ... end - 1` of dimension `dim`, 0 or 1. Of a weight [out, in] they are its outputs or inputs."""

    dim: int
    first: int
    end: int

    def of(self, tensor: Any) -> torch.Tensor:
        """Of a tensor, or of a slice of a safetensors file, which then reads nothing else."""
        return tensor[self.first : self.end] if self.dim == 0 else tensor[:, self.first : self.end]
