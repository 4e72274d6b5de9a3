"""Normalization of a stack, feature-major: the formula of ``rules.norm`` on memory that is there.

    u = gamma xn + beta,  xn = (z - m) r,  r = 1 / sqrt(v + eps)
    g_z = r (h - mean h - xn mean(h xn)),  h = gamma g_u,  g_gamma = sum_b g_u xn,  g_beta = sum_b g_u

Letters: K members, N features, B samples; z, u, xn and their cotangents (K, N, B), gamma and beta (K, N, 1).  A layer
norm takes mean and variance over the features (dim 1), a batch norm over the samples (dim 2).  Of a picture (``conv``)
the places of a channel are samples to a batch norm and features to a layer norm, which sees (K, C Q, B, J).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OVER = {"layer": (1, 3), "batch": (2,)}


@dataclass
class Norm:
    """One layer's: what it learns, and of a batch norm the running statistics that an evaluation uses."""

    kind: str  # layer, batch
    gamma: Tensor
    beta: Tensor
    eps: float
    running: tuple[Tensor, Tensor] | None = None  # mean and variance (K, N, 1)
    momentum: float = 0.1  # weight of the new batch in them
    places: tuple[int, int] | None = None  # C Q and J, of a layer norm of pictures; gamma and beta (K, C Q, 1, J)

    def _seen(self, x: Tensor) -> Tensor:
        return x if self.places is None else x.view(len(x), self.places[0], -1, self.places[1])

    @property
    def _over(self) -> tuple[int, ...]:
        return OVER[self.kind] if self.kind == "batch" or self.places else (1,)

    def forward(self, members: slice, z: Tensor, u: Tensor, training: bool) -> Tensor:
        """u from z, which becomes xn, of a batch norm without the factor r.  Returns r, (k, 1, B) or (k, N, 1)."""
        over, z, u = self._over, self._seen(z), self._seen(u)
        m = z.mean(over, keepdim=True)
        z.sub_(m)
        if self.kind == "batch":  # r is one number for all that gamma is one for: no pass of its own
            v = torch.linalg.vector_norm(z, dim=2, keepdim=True).square_().div_(z.shape[2])
            r = torch.rsqrt(v + self.eps)
            torch.mul(z, self.gamma[members] * r, out=u).add_(self.beta[members])
        else:
            v = torch.mul(z, z, out=u).mean(over, keepdim=True)
            r = torch.rsqrt(v + self.eps)
            torch.mul(z.mul_(r), self.gamma[members], out=u).add_(self.beta[members])
        if self.running and training:
            mean, var = (x[members] for x in self.running)
            n = z.shape[2]
            mean.lerp_(m, self.momentum)
            var.lerp_(v * (n / (n - 1)), self.momentum)
        return r

    def vjp(self, members: slice, g: Tensor, xn: Tensor, r: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """g_u becomes g_z in place; returns g_gamma and g_beta, as gamma is."""
        over, g, xn, spare = self._over, self._seen(g), self._seen(xn), self._seen(spare)
        torch.mul(g, xn, out=spare)
        g_gamma, g_beta = spare.sum(2, keepdim=True), g.sum(2, keepdim=True)
        gamma = self.gamma[members]
        if self.kind == "batch":
            g_gamma *= r
            per = gamma * r / -g.shape[2]
            torch.mul(xn, per * r * g_gamma, out=spare).add_(per * g_beta)
            torch.addcmul(spare, g, gamma * r, out=g)
            return g_gamma, g_beta
        g.mul_(gamma)
        along = torch.mul(g, xn, out=spare).mean(over, keepdim=True)
        mean = g.mean(over, keepdim=True)
        g.sub_(mean).sub_(torch.mul(xn, along, out=spare)).mul_(r)
        return g_gamma, g_beta
