"""Batch normalisation over the batch of all ranks, on any device."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aclip import dist


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation whose moments are those of the whole batch (Ioffe and Szegedy, arXiv 1502.03167).

        y = (x - mean) / sqrt(var + eps) * weight + bias,  mean and var over the rows of all ranks

    On one process, and in evaluation, it is torch's. On several, the moments are summed over ranks with their gradient,
    in fp32, so that N ranks with a part of the batch each equal one process with all of it. torch's `SyncBatchNorm`
    does the same and refuses tensors on a CPU; on CUDA `engine.wrap` puts it in this one's place.
    Ranks may bring different numbers of rows.
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
            self._remember(mean.detach(), variance.detach() * count / (count - 1))
            y = (x - mean) * torch.rsqrt(variance + self.eps)
            if self.affine:
                y = torch.addcmul(self.bias, y, self.weight)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
