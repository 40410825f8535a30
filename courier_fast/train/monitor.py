"""Signs of collapse: what the embeddings of a batch look like."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def uniformity(embeddings: Tensor, limit: int = 1024) -> Tensor:
    """log mean exp(-2 |x_i - x_j|^2) over pairs of normalised rows of [n, D] (Wang and Isola, arXiv
    2005.10242).

    0 where all are the same, about -4 + 8/D where they are spread evenly. The first `limit` rows
    are looked at.
    """
    x = torch.nn.functional.normalize(embeddings[:limit].float(), dim=1)
    if len(x) < 2:
        return x.new_zeros(())
    return torch.pdist(x).square().mul(-2).exp().mean().log()


@torch.no_grad()
def effective_rank(embeddings: Tensor, limit: int = 4096) -> Tensor:
    """exp of the entropy of the singular values of the centred rows of [n, D] (Roy and Vetterli,
    2007): 1 to min(n, D).

    0 where all rows are the same.
    """
    x = embeddings[:limit].double()
    x = x - x.mean(0)
    covariance = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    # Below rounding of the rows themselves nothing is a dimension.
    total = values.sum()
    if total <= 1e-6 * embeddings.float().norm():
        return torch.zeros((), device=x.device)
    p = values / total
    return torch.special.entr(p).sum().exp().float()
