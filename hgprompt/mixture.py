"""H of the mixed features as a function of α, from kept features or from their moments.

With Σ_a(α) the shrunk covariance of Σα_i f_i and R(α) [h, C] its class means, each times √π_c,

    H_a(α) = (1-a) tr(Rᵀ Z),   Z = Σ_a⁻¹ R,

and Z, the discriminants, are all that a gradient needs beside: H_a(α) = (1-a) max_Z 2⟨Z, R(α)⟩ - ⟨Z, Σ_a(α) Z⟩, so that
the derivative is that of the bracket at a fixed Z.

Letters in shapes: M prompts, N images, h feature width, C observed classes.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hgprompt.errors import StatisticsError
from hgprompt.kernels.mixture import mix, pull_back_mixture
from hgprompt.moments import Moments, class_sums, mixed

# Below this intensity, Woodbury's difference of two nearly equal matrices loses the digits that it saves time on.
_WOODBURY_FROM = 1e-4
_IMAGES_AT_ONCE = 64  # float64 copies of all prompts' features are of so many
# A fold that held nearly all of the variance cannot be subtracted: what is left would be rounding.
_SUBTRACT_FROM = 1e-4
_FEW = 8  # null directions of a covariance that are found without its spectrum


class FeatureMixture:
    """From kept features, which stay in their own dtype: no float64 copy of all of them is ever made.

    Args:
        features: [M, N, h]. labels: [N].

    Attributes:
        features: as given. means: [M, h], float64. r: √π_c · (class mean - mean), [M, C, h], float64. n: N.
        spread: tr C_ii [M]. noise: what rounding alone would make of that [M].
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        m, self.n, h = features.shape
        if self.n == 0:
            raise StatisticsError("no images are left")
        classes, self._index = labels.to(features.device).unique(return_inverse=True)
        counts = self._index.bincount(minlength=len(classes)).double()
        self.features = features
        self.means = torch.empty(m, h, dtype=torch.float64, device=features.device)
        self.r = self.means.new_empty(m, len(classes), h)
        self.spread, magnitude = self.means.new_empty(m), self.means.new_empty(m)
        for i, one in enumerate(features):
            f = one.double()
            self.means[i] = f.mean(0)
            magnitude[i] = f.square().sum() / self.n
            f = f - self.means[i]
            f = f - f.mean(0)  # what rounding left of a mean far larger than the spread
            self.spread[i] = f.square().sum() / self.n
            self.r[i] = class_sums(f[None], self._index, len(classes))[0] / (counts * self.n).sqrt()[:, None]
        self.noise = rounding_noise(magnitude, features.dtype)

    @cached_property
    def traces(self) -> Tensor:
        """tr C_ij [M, M] of the covariance of the features of every two prompts."""
        total = self.means.new_zeros(len(self.means), len(self.means))
        for start in range(0, self.n, _IMAGES_AT_ONCE):
            f = (self.features[:, start : start + _IMAGES_AT_ONCE].double() - self.means[:, None]).flatten(1)
            total += f @ f.T
        return total / self.n

    def is_constant(self, weights: Tensor, spread: Tensor) -> bool:
        """Whether a mixture of this spread (tr Σ) is the same for every image but for rounding: prompts cancelled."""
        return bool(spread <= mixed_noise(self.noise, weights))

    def centred(self, prompt: int) -> Tensor:
        """Features of one prompt less their mean [N, h], float64."""
        return self.features[prompt].double() - self.means[prompt]

    def project(self, basis: Tensor) -> Tensor:
        """Centred features in a basis [h, k]: [M, N, k], float64."""
        basis = basis.to(self.means.device)
        return torch.stack([self.centred(i) @ basis for i in range(len(self.means))])

    def uniform(self) -> tuple[Tensor, Tensor]:
        """Σ [h, h] of the uniform mixture, and Σ_n ‖f_n‖⁴ []."""
        m = len(self.means)
        f = self._mix(torch.full((m,), 1 / m, dtype=torch.float64, device="cpu"))
        return square(f) / self.n, f.square().sum(1).square().sum()

    def discriminants(self, weights: Tensor, a: float) -> tuple[float, Tensor]:
        """H_a(α), and Z [h, C]."""
        _, value, z = self._solve(weights, a)
        return value, z

    def value_and_gradient(self, weights: Tensor, a: float) -> tuple[float, Tensor]:
        """H_a(α) and its gradient [M]."""
        f, value, z = self._solve(weights, a)
        n, h = f.shape
        slope = -(1 - a) * (2 / n) * ((1 - a) * ((f @ z) @ z.T) + (a / h) * z.square().sum() * f)
        if slope.is_cuda:
            gradient = pull_back_mixture(slope, self.features, self.means)
        else:
            gradient = torch.stack([(self.centred(i) * slope).sum() for i in range(len(self.means))])
        return value, gradient + 2 * (1 - a) * torch.mv(self.r.flatten(1), z.T.flatten())

    def influence(self, weights: Tensor, a: float, z: Tensor) -> Tensor:
        """Influence function of H_a(α) at every image [N]: its derivative in the share of that image, a held fixed.

        With the centred f_n, its class y, R = Σ_c √π_c μ_c and Z = Σ_a⁻¹R (the mean over images is 0):

            (1-a) [2 f_nᵀV_y - μ_yᵀV_y - tr RᵀZ - (1-a)(‖Zᵀf_n‖² - mean) - (a/h)‖Z‖² (‖f_n‖² - mean)],  V_c = Z_c/√π_c

        Σ influence² / N² estimates the variance of H_a(α) (the infinitesimal jackknife; Efron 1982, "The jackknife, the
        bootstrap and other resampling plans", chapter 6).
        """
        f, r = self._mix(weights), mixed(self.r, weights)
        prior = self._index.bincount(minlength=len(r)).to(f) / self.n
        each = (r * z.T).sum(1)
        t = f @ z
        along = t.gather(1, self._index[:, None]).squeeze(1) / prior.sqrt()[self._index]
        between = 2 * along - (each / prior)[self._index] - each.sum()
        spread, length = t.square().sum(1), f.square().sum(1)
        within = (1 - a) * (spread - spread.mean()) + a / len(z) * z.square().sum() * (length - length.mean())
        return (1 - a) * (between - within)

    def without_folds(self, fold_of: Tensor, folds: int, weights: Tensor, a: float) -> tuple[Tensor, Tensor]:
        """H_a(α) [K] and its gradient [K, M] without the images of each fold in turn, in two passes over the features.

        Args:
            fold_of: fold of each image [N]. folds: K. weights, a: as for `value_and_gradient`.

        Returns:
            The same as `FeatureMixture` of the other images alone would give; NaN where they are of fewer than two
            classes, or where the mixed features are the same for all of them.
        """
        f, fold_of, c = self._mix(weights), fold_of.to(self.means.device), self.r.shape[1]
        kept = torch.stack([fold_of != k for k in range(folds)], dim=1).to(f)  # [N, K]
        n, h = kept.sum(0).clamp_min(1), f.shape[1]
        counts = torch.stack([self._index[fold_of != k].bincount(minlength=c) for k in range(folds)]).to(f)  # [K, C]
        place = fold_of.long() * c + self._index

        def without(centred: Tensor) -> tuple[Tensor, Tensor]:
            """Means [K, h] and √π_c · (class means - means) [K, C, h] of centred features [N, h]."""
            by_fold = class_sums(centred[None], place, folds * c)[0].unflatten(0, (folds, c))
            sums = by_fold.sum(0) - by_fold
            mean = sums.sum(1) / n[:, None]
            r = sums / counts.clamp_min(1)[..., None] - mean[:, None]
            return mean, r * (counts / n[:, None]).sqrt()[..., None]  # nothing where a class has no image left

        mean, r = without(f)
        whole, discriminants, by_itself = square(f), [], []
        known = (counts > 0).sum(1) >= 2
        for k in range(folds):
            left_out = f[fold_of == k]
            covariance = (whole - left_out.T @ left_out) / n[k] - torch.outer(mean[k], mean[k])
            if float(covariance.trace() * n[k]) < _SUBTRACT_FROM * float(whole.trace()):
                by_itself.append(k)
            ridge = a * covariance.trace() / h
            discriminants.append(solve_regularized((1 - a) * covariance, ridge, r[k].T, int(n[k])))
        z = torch.stack(discriminants)  # [K, h, C]
        flat = z.transpose(0, 1).flatten(1)
        along, mean_along = f @ flat, torch.einsum("kh,khc->kc", mean, z)
        gradients = []
        for i in range(len(self.means)):  # tr(Zᵀ C_iα Z) and tr C_iα
            one = self.centred(i)
            one_mean, one_r = without(one)
            inside = ((one @ flat) * along).unflatten(1, (folds, c)).sum(2)
            inside = (inside * kept).sum(0) / n - (torch.einsum("kh,khc->kc", one_mean, z) * mean_along).sum(1)
            trace = ((one * f).sum(1) @ kept) / n - (one_mean * mean).sum(1)
            penalty = (1 - a) * inside + (a / h) * z.square().sum((1, 2)) * trace
            gradients.append(2 * (1 - a) * ((one_r * z.transpose(1, 2)).sum((1, 2)) - penalty))
        values, slopes = (1 - a) * (r * z.transpose(1, 2)).sum((1, 2)), torch.stack(gradients, dim=1)
        for k in by_itself:
            if known[k]:
                left = FeatureMixture(self.features[:, fold_of != k], self._index[fold_of != k])
                values[k], slopes[k] = left.value_and_gradient(weights, a)
                known[k] = not left.is_constant(weights, left._mix(weights).square().sum() / left.n)
        return values.where(known, torch.nan), slopes.where(known[:, None], torch.nan)

    def _mix(self, weights: Tensor) -> Tensor:
        """Σ α_i (f_i - mean_i), [N, h], float64."""
        if self.features.dtype == torch.float64:
            # Mixed first, features far from zero would be rounded to the digits of their mean, and lose their spread.
            # Narrower features have digits to spare in float64.
            f = sum((w * self.centred(i) for i, w in enumerate(weights)), self.means.new_zeros(()))
        elif self.features.is_cuda:
            f = mix(self.features, self.means, weights)
        else:
            f = mixed(self.features, weights) - mixed(self.means, weights)
        return f - f.mean(0)

    def _solve(self, weights: Tensor, a: float) -> tuple[Tensor, float, Tensor]:
        f, r = self._mix(weights), mixed(self.r, weights)
        n, h = f.shape
        sigma = f.square().sum() / (n * h)
        if self.is_constant(weights, sigma * h):
            return f, 0.0, torch.zeros_like(r.T)
        if n < h and a > _WOODBURY_FROM:
            inner = (1 - a) * (f @ f.T)
            inner.diagonal().add_(n * a * sigma)
            correction = f.T @ torch.cholesky_solve(f @ r.T, torch.linalg.cholesky(inner))
            z = (r.T - (1 - a) * correction) / (a * sigma)
        else:
            z = solve_regularized((1 - a) / n * square(f), a * sigma, r.T, n)
        return f, (1 - a) * float((r.T * z).sum()), z


class MomentMixture:
    """From moments: Σ(α) = Σ α_i α_j C_ij, with C_ij the h × h covariance of the features of prompts i and j.

    Args:
        dtype: of the features that the moments are of.

    Attributes:
        mean [M, h], about the moments' pilot centre. r, n, spread, noise: as for `FeatureMixture`.
    """

    def __init__(self, moments: Moments, dtype: torch.dtype) -> None:
        if moments.count == 0:
            raise StatisticsError("no images are left")
        self.moments = moments
        self.n = moments.count
        self.mean = moments.sums / self.n
        self.r = scaled_class_means(moments)
        assert moments.centre is not None
        magnitude = (moments.centre + self.mean).square().sum(1)
        second = torch.stack([row[:, 0].diagonal().sum() for row in moments.rows]) / self.n
        self.spread = second - self.mean.square().sum(1)
        self.noise = rounding_noise(magnitude, dtype)

    @cached_property
    def traces(self) -> Tensor:
        """tr C_ij [M, M]."""
        total = torch.zeros_like(self.mean @ self.mean.T)
        for i, row in enumerate(self.moments.rows):
            total[i, i:] = row.diagonal(dim1=0, dim2=2).sum(1)
        return (total + total.triu(1).T) / self.n - self.mean @ self.mean.T

    def is_constant(self, weights: Tensor, spread: Tensor) -> bool:
        """As for `FeatureMixture`, with the rounding of sums of second moments besides."""
        return bool(spread <= mixed_noise(self.noise, weights, self.spread))

    def tells_apart(self, weights: Tensor) -> bool:
        """Whether H of the mixture has an answer: at least two classes, and features that are not all the same."""
        along = weights.to(self.traces)
        return self.r.shape[1] >= 2 and not self.is_constant(weights, along @ self.traces @ along)

    def uniform(self) -> tuple[Tensor, Tensor]:
        """As for `FeatureMixture`."""
        mean = self.mean.mean(0)
        covariance = self.moments.mixed_second() / self.n - torch.outer(mean, mean)
        return covariance, self.moments.shifted_fourth(-mean)[1]

    def discriminants(self, weights: Tensor, a: float) -> tuple[float, Tensor]:
        """H_a(α), and Z [h, C]."""
        mean, r = mixed(self.mean, weights), mixed(self.r, weights)
        covariance = self.moments.quadratic(weights) / self.n - torch.outer(mean, mean)
        if self.is_constant(weights, covariance.trace()):
            return 0.0, torch.zeros_like(r.T)
        z = solve_regularized((1 - a) * covariance, a * covariance.trace() / len(covariance), r.T, self.n)
        return (1 - a) * float((r.T * z).sum()), z

    def value_and_gradient(self, weights: Tensor, a: float) -> tuple[float, Tensor]:
        """H_a(α) and its gradient [M]."""
        value, z = self.discriminants(weights, a)
        slope = (1 - a) * z @ z.T
        slope.diagonal().add_((a / len(z)) * z.square().sum())
        gradient = -2 * (1 - a) * self._inner(slope) @ weights.to(self.mean.device)
        return value, gradient + 2 * (1 - a) * torch.mv(self.r.flatten(1), z.T.flatten())

    def _inner(self, matrix: Tensor) -> Tensor:
        """⟨G, C_ij⟩ [M, M] with a symmetric G."""
        return self.moments.inner(matrix) / self.n - self.mean @ matrix @ self.mean.T


def solve_regularized(covariance: Tensor, ridge: Tensor, right: Tensor, n: int) -> Tensor:
    """(covariance + ridge·I)⁻¹ right; a generalised inverse where that is singular (Eq. 5 to the letter).

    H depends on none of the choice among them, since class means lie in the range of the covariance.
    """
    matrix = covariance.clone()
    matrix.diagonal().add_(ridge)
    scale = inverse_spread(matrix.diagonal(), n)
    matrix, right = scale[:, None] * matrix * scale, scale[:, None] * right
    if float(ridge) > 0:
        factor, info = torch.linalg.cholesky_ex(matrix)
        diagonal = factor.diagonal()
        if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
            return scale[:, None] * torch.cholesky_solve(right, factor)
    elif (solution := _solve_beside_few_null(matrix, right, n)) is not None:
        return scale[:, None] * solution
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > singular_below(n, values), 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return scale[:, None] * ((vectors * inverse) @ (vectors.T @ right))


def _solve_beside_few_null(matrix: Tensor, right: Tensor, n: int) -> Tensor | None:
    """matrix⁺ right without its spectrum, where it is plain which few directions are null; None where it is not.

    Features after a LayerNorm have such a direction, however many images there are. Its eigenvalue is rounding, which
    the pivots of a Cholesky factor do not show: all of them take a part of it. Inverse iteration does.
    """
    null_below = singular_below(n, matrix.diagonal())
    shifted = matrix.clone()
    shifted.diagonal().add_(null_below)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(matrix), min(_FEW, len(matrix)), generator=generator, dtype=matrix.dtype, device="cpu")
    x = start.to(matrix.device)
    for _ in range(3):
        x = torch.linalg.qr(torch.cholesky_solve(x, factor)).Q
    values, turn = torch.linalg.eigh(x.T @ matrix @ x)
    null = values <= null_below
    # The largest eigenvalue lies between the largest element of the diagonal and the largest sum of a row.
    plain = null | (values > 1e3 * singular_below(n, matrix.abs().sum(1)))
    if not bool(plain.all()) or bool(null.all()):
        return None
    u = (x @ turn)[:, null]
    factor, info = torch.linalg.cholesky_ex(matrix + u @ u.T)
    return None if int(info) else torch.cholesky_solve(right - u @ (u.T @ right), factor)


def inverse_spread(variances: Tensor, n: int) -> Tensor:
    """Factors [h] that bring variances [h] to 1, so that a faint feature keeps the digits it has beside a strong one;
    powers of two, which round nothing. 0 for a feature that is constant but for the rounding of the strongest: one
    whose standard deviation is 10⁷ times smaller."""
    scale = torch.exp2(-variances.clamp_min(1e-300).log2().div(2).round())
    return torch.where(variances > singular_below(n, variances), scale, torch.zeros_like(scale))


def singular_below(n: int, values: Tensor) -> Tensor:
    """Eigenvalues or variances no larger than this are 0 but for rounding, beside values [h] from n images."""
    # Few images and features round no less than some do: prompts may have cancelled one another.
    return max(n, len(values), 64) * torch.finfo(values.dtype).eps * values.max().clamp_min(0)


def class_means(centred: Tensor, labels: Tensor) -> Tensor:
    """√π_c · (mean of class c), [M, C, h], of centred features [M, N, h]; classes in ascending order."""
    classes, index = labels.unique(return_inverse=True)
    sums = class_sums(centred, index, len(classes))
    counts = index.bincount(minlength=len(classes)).to(centred)
    return sums / (counts * centred.shape[1]).sqrt()[:, None]


def scaled_class_means(moments: Moments) -> Tensor:
    """√π_c · (mean of class c less the mean), [M, C, h], of moments."""
    labels = sorted(moments.class_sums)
    counts = torch.tensor([moments.class_counts[c] for c in labels], dtype=torch.float64, device=moments.sums.device)
    sums = torch.stack([moments.class_sums[c] for c in labels], dim=1)
    means = sums / counts[:, None] - (moments.sums / moments.count)[:, None]
    return means * (counts / moments.count).sqrt()[:, None]


def rounding_noise(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Spread that rounding alone may make of features that are all the same, of this mean square and dtype."""
    # 2.2 eps were seen of a network in float32 whose features could not differ.
    return (4 * torch.finfo(dtype).eps) ** 2 * magnitude


def mixed_noise(noise: Tensor, weights: Tensor, spread: Tensor | None = None) -> Tensor:
    """The same for the mixture, from the noise of each prompt [M]; below, prompts have cancelled one another. Where its
    spread is summed from moments, the spread of each prompt [M] says what that sum rounds besides."""
    weights = weights.to(noise)
    total = weights.square() @ noise
    if spread is None:
        return total
    return total + 1e-14 * (weights.abs() @ spread.clamp_min(0).sqrt()).square()


def square(f: Tensor) -> Tensor:
    """fᵀf [h, h] of f [N, h]. It is symmetric, so on a CPU little more than half of the product is computed: the left
    half of the columns, the right half, and between them one block that stands on both sides. On a GPU so small a
    product is bound by its launches, and is one."""
    half = f.shape[1] // 2
    if half < 96 or f.is_cuda:
        return f.T @ f
    left, right = f[:, :half], f[:, half:]
    off = left.T @ right
    return torch.cat([torch.cat([square(left), off], dim=1), torch.cat([off.T, square(right)], dim=1)])
