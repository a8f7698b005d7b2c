"""The projection heads of the self-supervised objectives, with batch normalisation over all ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip import dist
from aclip.structs import TowerShape


def hidden_width(shape: TowerShape) -> int:
    """Return the hidden width of the heads: 4096 as in the A-CLIP paper, 16/3 of the width for towers below 768."""
    return min(4096, shape.width * 16 // 3)


def mlp(widths: Sequence[int], bias: bool) -> nn.Sequential:
    """Return Linear (BatchNorm ReLU Linear)*: a projection head; no norm or activation after the last.

    Args:
        widths: input width, hidden widths, output width.
        bias: whether the linear layers have biases.
    """
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        if i > 0:
            layers += [BatchNorm1d(widths[i]), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bias))
    return nn.Sequential(*layers)


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation with the moments of the whole batch (Ioffe and Szegedy, arXiv 1502.03167).

        y = (x - mean) / sqrt(var + eps) * weight + bias,  mean and var over the rows of all ranks

    On one process, and in evaluation, it is torch's. On several, the moments are summed over ranks in float32 and with
    their gradient, so that N ranks equal one process with the whole batch. Ranks may have different numbers of rows.
    torch's `SyncBatchNorm` computes the same on CUDA, where training replaces this module by it, but not on CPU.
    """

    def forward(self, input: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """Normalise."""
        if dist.world_size() == 1 or not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            count = dist.sum_over_ranks(torch.tensor(float(len(x)), device=x.device))
            mean = dist.sum_with_gradient(x.sum(dim=0)) / count
            variance = dist.sum_with_gradient((x - mean).square().sum(dim=0)) / count
            self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
            y = (x - mean) * torch.rsqrt(variance + self.eps)
            if self.affine:
                y = torch.addcmul(self.bias, y, self.weight)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)
