"""Chains that the tests of this folder share."""

import pyro.distributions as dist
import torch
from torch import nn

from pyroelbo import models
from pyroelbo.models.links import GaussianLink


class Affine(nn.Module):
    """N(W x + b, S) with a full covariance: a kind of link that the library does not have."""

    def __init__(self, weight, shift, covariance):
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight.clone()), nn.Parameter(shift.clone())
        self.register_buffer("root", torch.linalg.cholesky(covariance))

    def forward(self, x):
        return dist.MultivariateNormal(x @ self.weight.mT + self.shift, scale_tril=self.root)


class Standard(nn.Module):
    """N(0, I), of the kind that has a closed KL to an :class:`Affine` link."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self):
        return dist.MultivariateNormal(torch.zeros(self.out), torch.eye(self.out))


def ladder(**settings):
    torch.manual_seed(0)
    pair = models.Ladder(6, (3, 2, 2), (8, 6, 5), **settings)
    for merge in pair.encoder.links:  # away from KL 0, where it starts
        nn.init.normal_(merge.head.weight, std=0.3)
    return pair


def links(*sizes):
    return [GaussianLink(a, b) for a, b in sizes]
