"""H_a(α) in a subspace of the features: what `hgprompt.reduced_basis` runs on.

Letters in shapes: M prompts, N images, h feature width, k directions of the subspace, P = M(M+1)/2 pairs of prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hgprompt.mixture import FeatureMixture, MomentMixture, mixed_noise, solve_regularized, square
from hgprompt.moments import mixed


class ProjectedMixture:
    """H_a(α) with discriminants confined to a subspace: for every α at most the whole H, and equal to it, gradient
    included, where the subspace holds Z(α).

    Args:
        blocks: C_ij + C_ji (C_ii for i = j) in an orthonormal basis of the subspace, the lower triangles row by row,
            [P, k(k+1)/2]. r: class means as in `FeatureMixture`, in that basis, [M, C, k].
        traces: tr C_ij [M, M] in all h directions, which the shrinkage is taken from. noise [M]: as for
            `FeatureMixture`. width: h. n: N.
    """

    def __init__(self, blocks: Tensor, r: Tensor, traces: Tensor, noise: Tensor, width: int, n: int) -> None:
        self.r, self.traces, self.noise, self.width, self.n = r, traces, noise, width, n
        m, _, k = r.shape
        self._blocks = blocks
        self._rows, self._columns = torch.tril_indices(k, k, device="cpu")
        self._first, self._second = torch.triu_indices(m, m, device="cpu")

    def select(self, prompts: Tensor) -> ProjectedMixture:
        """Of these prompts alone, in this order."""
        m = len(self.traces)
        place = torch.zeros(m, m, dtype=torch.int64, device="cpu")
        each = torch.arange(len(self._first), device="cpu")
        place[self._first, self._second] = place[self._second, self._first] = each
        inside = torch.triu_indices(len(prompts), len(prompts), device="cpu")
        chosen = place[prompts[inside[0]], prompts[inside[1]]]
        traces = self.traces[prompts][:, prompts]
        return ProjectedMixture(self._blocks[chosen], self.r[prompts], traces, self.noise[prompts], self.width, self.n)

    def value_and_gradient(self, weights: Tensor, a: float) -> tuple[float, Tensor]:
        """The confined H_a(α) and its gradient [M]."""
        m, k = len(weights), self.r.shape[2]
        along = self.traces @ weights
        if bool(weights @ along <= mixed_noise(self.noise, weights, self.traces.diagonal())):
            return 0.0, torch.zeros_like(weights)
        matrix = weights.new_zeros(k, k)
        matrix[self._rows, self._columns] = (1 - a) * (weights[self._first] * weights[self._second]) @ self._blocks
        matrix += matrix.tril(-1).T
        r = mixed(self.r, weights)
        z = solve_regularized(matrix, a * (weights @ along) / self.width, r.T, self.n)
        value = (1 - a) * float((r.T * z).sum())
        slope = 2 * z @ z.T
        slope.diagonal().div_(2)
        products = weights.new_zeros(m, m)
        products[self._first, self._second] = self._blocks @ slope[self._rows, self._columns]
        products = products + products.T  # ⟨ZZᵀ, C_ij + C_ji⟩, twice ⟨ZZᵀ, C_ii⟩ on the diagonal
        gradient = -(1 - a) * ((1 - a) * products @ weights + (2 * a / self.width) * z.square().sum() * along)
        return value, gradient + 2 * (1 - a) * torch.mv(self.r.flatten(1), z.T.flatten())


class FeatureProjection:
    """Kept features in a basis that grows.

    Args:
        mixture: whose features. Everything that comes out is on the CPU: it is small.
    """

    def __init__(self, mixture: FeatureMixture) -> None:
        self.mixture = mixture
        self._features: Tensor | None = None  # [M, N, k]
        self._blocks: Tensor | None = None  # sums over images, as in `ProjectedMixture`

    def onto(self, basis: Tensor, known: int) -> ProjectedMixture:
        """The mixture in a basis [h, k] whose first `known` directions are those of the call before."""
        new = self.mixture.project(basis[:, known:])
        if self._features is None or self._blocks is None or not known:
            self._features, self._blocks = new, _products(new, new, 0)
        else:
            self._features = torch.cat([self._features, new], dim=2)
            self._blocks = torch.cat([self._blocks, _products(new, self._features, known)], dim=1)
        r = self.mixture.r @ basis.to(new.device)
        blocks, traces, noise = self._blocks / self.mixture.n, self.mixture.traces, self.mixture.noise
        return ProjectedMixture(blocks.cpu(), r.cpu(), traces.cpu(), noise.cpu(), len(basis), self.mixture.n)


class MomentProjection:
    """Moments in a basis; made anew for each."""

    def __init__(self, mixture: MomentMixture) -> None:
        self.mixture = mixture

    def onto(self, basis: Tensor, known: int) -> ProjectedMixture:
        """As for `FeatureProjection`."""
        del known
        basis = basis.to(self.mixture.mean.device)
        n, mean = self.mixture.n, self.mixture.mean @ basis
        k = basis.shape[1]
        rows, columns = torch.tril_indices(k, k, device="cpu")
        blocks = []
        for i, row in enumerate(self.mixture.moments.rows):
            projected = torch.einsum("hk,hml->mkl", basis, row @ basis)
            c = projected / n - mean[i][None, :, None] * mean[i:, None, :]
            c = c + c.transpose(1, 2)
            c[0] /= 2
            blocks.append(c[:, rows, columns])
        r = self.mixture.r @ basis
        traces, noise = self.mixture.traces, self.mixture.noise
        return ProjectedMixture(torch.cat(blocks).cpu(), r.cpu(), traces.cpu(), noise.cpu(), len(basis), n)


def _products(new: Tensor, everything: Tensor, known: int) -> Tensor:
    """Σ_n f_i[r] f_j[c] + f_j[r] f_i[c] for the pairs i ≤ j, the new directions r and all c ≤ r: rows to append to a
    packed lower triangle. new: [M, N, k - known], the last directions of everything [M, N, k]."""
    m, n, k = everything.shape
    columns = everything.transpose(0, 1).reshape(n, -1)
    sums = square(columns) if not known else new.transpose(1, 2).reshape(-1, n) @ columns
    sums = sums.view(m, k - known, m, k)
    rows, columns = torch.tril_indices(k - known, k, known, device=new.device)
    first, second = torch.triu_indices(m, m, device=new.device)
    packed = sums.transpose(1, 2)[:, :, rows, columns]  # [M, M, ...]
    packed = packed + packed.transpose(0, 1)
    packed.diagonal().div_(2)
    return packed[first, second]
