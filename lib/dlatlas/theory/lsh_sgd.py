r"""LGD: stochastic gradients sampled by locality-sensitive hashing (chen2018lshsgd).

Drawing samples with probability proportional to the norm of their gradient gives the smallest variance, but the norms change with every
update and computing them costs as much as a full gradient. For linear regression the norm is an inner product of the parameters with
a vector that never changes. A hash table that was filled once finds samples with a large inner product in constant time, and the
probability of what it found is known, so that the gradient can be weighted to stay unbiased.

Equations:

For $f(\theta) = \frac1N \sum_i (\theta \cdot x_i - y_i)^2$ the gradient of sample $i$ has the norm

$$ \|g_i\| = 2 \, | \langle q, v_i \rangle | \, \|x_i\| , \qquad q = [\theta, -1] , \quad v_i = [x_i, y_i] , $$

with $x_i$ scaled to norm 1 beforehand. A SimHash bit is $\operatorname{sign}(r \cdot v)$ with $r \sim N(0, I)$; the bits of $q$ and $v$ agree with
probability $c = 1 - \angle(q, v) / \pi$. There are $L$ tables of $K$ bits. Both signs of the inner product count, hence $v_i$ and $-v_i$ are
stored, $n = 2N$ entries. Tables are tried in random order until the query's bucket $S$ is not empty, at the $l$-th try, and an entry is
drawn uniformly from it. With $c$ of the drawn entry,

$$ p = \frac{c^K (1 - c^K)^{l - 1}}{|S|} , \qquad \hat g = \frac{g_i}{n \, p} . $$

Deviations from the paper:

1. Tables are sorted arrays of codes instead of linked buckets; a query is a binary search in each.
2. The published $p$ is the probability over fresh random tables, not over the draws from given ones. For one set of tables the estimate
   is biased; its mean over tables is the gradient only if the first bucket tried is never empty. Otherwise every $l > 1$ adds to the
   expectation, since an empty bucket says more than that the drawn entry is not in it. With $e$ the probability of an empty bucket,
   entry $i$ is weighted by $1 / (1 - e / (1 - c_i^K))$ instead of 1.
3. The copy of a sample that points away from the query is drawn with a tiny $p$ and then weighted by a huge $1/p$, although it carries the
   same gradient as the other copy. `fold=True` counts the two as one: $h = c^K + (1 - c)^K$ takes the place of $c^K$, and $N$ that of $n$.
4. Linear regression; the paper adds logistic regression and the last layer of a network, with the same sampler.

Later work: The idea moved from gradients to activations: SLIDE (Chen et al. 2020) uses such tables to pick the neurons of wide layers,
and MONGOOSE (Chen et al. 2021) learns the hash functions. For gradients, importance sampling by cheaper bounds (Katharopoulos and Fleuret
2018) is more common. Large weights $1/p$ make the tails heavy, which mini-batches of uniform samples do not have.

Example:
    import torch
    from dlatlas.theory.lsh_sgd import SimHashSampler, lgd_gradient

    x = torch.nn.functional.normalize(torch.randn(1000, 10), dim=1)
    y = x @ torch.randn(10) + 3.0 * (torch.rand(1000) < 0.02)  # a few large residuals
    theta = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    sampler = SimHashSampler(torch.cat([x, y[:, None]], 1))
    query = torch.cat([theta, -torch.ones(1)])
    residual = (x @ theta - y).abs()
    drawn = [sampler.sample(query)[0] for _ in range(300)]
    print(f"mean residual: all samples {residual.mean():.3f}, drawn samples {residual[drawn].mean():.3f}")
    exact = 2 * ((x @ theta - y)[:, None] * x).mean(0)
    estimate = torch.stack([lgd_gradient(sampler, x, y, theta) for _ in range(300)]).mean(0)
    print(f"mean of 300 estimates is off by {(estimate - exact).norm():.3f}; norm of one sample's gradient {(2 * residual.mean()):.3f}")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["SimHashSampler", "collision_prob", "lgd_gradient"]


def collision_prob(u: Tensor, v: Tensor) -> Tensor:
    r"""Probability that one SimHash bit of two vectors agrees, $1 - \angle(u, v) / \pi$.

    Args:
        u: ``[..., d]``.
        v: ``[..., d]``, broadcast against `u`; 1/2 where one of them is zero.

    Returns:
        ``[...]`` in [0, 1].
    """
    if u.shape[-1] != v.shape[-1]:
        raise ValueError(f"expected vectors of one length, got {tuple(u.shape)} and {tuple(v.shape)}")
    u, v = torch.nn.functional.normalize(u, dim=-1), torch.nn.functional.normalize(v, dim=-1)
    # The half angle by atan2: acos of the inner product loses half of the digits near 0 and pi.
    return 1 - 2 / math.pi * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


class SimHashSampler:
    r"""Draws rows of a matrix with a probability that grows with their inner product with a query (its magnitude if `signed`).

    Args:
        V: stored vectors ``[N, d]``, none of them zero.
        bits: bits $K$ of a table, at most 62; more bits prefer large inner products more strongly and empty more buckets.
        tables: number $L$ of tables.
        signed: store each vector with both signs.
        generator: CPU generator of the hyperplanes and of the draws.

    Raises:
        ValueError: bits or tables < 1, not a matrix, no rows, a zero row.
    """

    def __init__(self, V: Tensor, bits: int = 5, tables: int = 100, signed: bool = True, generator: torch.Generator | None = None):
        if not 1 <= bits <= 62 or tables < 1:
            raise ValueError(f"bits must be between 1 and 62 and tables at least 1, got bits={bits}, tables={tables}")
        if V.dim() != 2 or len(V) == 0:
            raise ValueError(f"expected vectors [N, d], got shape {tuple(V.shape)}")
        if not V.isfinite().all() or not (V.norm(dim=1) > 0).all():
            raise ValueError("every stored vector must be finite and different from zero")
        self.bits, self.tables, self.generator = bits, tables, generator
        self.n, self.n_entries = len(V), len(V) * (2 if signed else 1)
        self.entries = torch.cat([V, -V]) if signed else V  # [n_entries, d]
        self.planes = torch.randn(tables, bits, V.shape[1], dtype=V.dtype, generator=generator).to(V.device)
        codes, self._order = self._codes(self.entries).sort(dim=1)  # [tables, n_entries]
        self._sorted = codes.contiguous()

    def _codes(self, vectors: Tensor) -> Tensor:
        bits = torch.einsum("lkd,nd->lnk", self.planes, vectors) > 0  # [tables, n, bits]
        return (bits * 2 ** torch.arange(self.bits, device=bits.device)).sum(-1)

    def buckets(self, query: Tensor) -> list[Tensor]:
        """The entries ``[size]`` in the query's bucket of every table; entry j is sample ``j % N``, with the other sign from N on."""
        low, high = self._range(query)
        return [self._order[t, a:b] for t, (a, b) in enumerate(zip(low.tolist(), high.tolist()))]

    def _range(self, query: Tensor) -> tuple[Tensor, Tensor]:
        if query.shape != self.entries.shape[1:]:
            raise ValueError(f"expected a query of shape {tuple(self.entries.shape[1:])}, got {tuple(query.shape)}")
        if not query.isfinite().all() or not query.norm() > 0:
            raise ValueError("the query must be finite and different from zero")
        code = self._codes(query[None])  # [tables, 1]
        return torch.searchsorted(self._sorted, code)[:, 0], torch.searchsorted(self._sorted, code, right=True)[:, 0]

    def sample(self, query: Tensor, *, fold: bool = False) -> tuple[int, float, int]:
        r"""Draw one sample for a query ``[d]``.

        Args:
            query: inner products with it decide.
            fold: give the probability of the sample with either sign, $h = c^K + (1 - c)^K$ in place of $c^K$.

        Returns:
            The index in [0, N), the probability $p = c^K (1 - c^K)^{l-1} / |S|$ of the drawn entry, and the number of tables tried, $l$.

        Raises:
            ValueError: a zero query or one of the wrong length, fold without signs.
            RuntimeError: the query's bucket is empty in every table.
        """
        if fold and self.n_entries == self.n:
            raise ValueError("fold needs a sampler that stores both signs")
        low, high = self._range(query)
        sizes = high - low
        for tries, table in enumerate(torch.randperm(self.tables, generator=self.generator).tolist(), 1):
            if size := int(sizes[table]):
                place = int(low[table]) + int(torch.randint(size, (), generator=self.generator))
                entry = int(self._order[table, place])
                c = float(collision_prob(self.entries[entry], query))
                hit = c**self.bits + ((1 - c) ** self.bits if fold else 0.0)
                return entry % self.n, hit * (1 - hit) ** (tries - 1) / size, tries
        raise RuntimeError(f"the query's bucket is empty in all {self.tables} tables; use fewer bits or more tables")


def lgd_gradient(sampler: SimHashSampler, X: Tensor, y: Tensor, theta: Tensor, *, fold: bool = False) -> Tensor:
    r"""One estimate $g_i / (n p)$, or $g_i / (N p)$ if `fold`, of the gradient of the mean squared residual.

    Args:
        sampler: built from the rows ``[x_i, y_i]``.
        X: inputs ``[N, d]``, rows of norm 1.
        y: targets ``[N]``.
        theta: parameters ``[d]``.
        fold: count the two copies of a sample as one.

    Returns:
        ``[d]``.

    Raises:
        ValueError: shapes that do not match each other or the sampler.
    """
    if X.dim() != 2 or y.shape != X.shape[:1] or theta.shape != X.shape[1:] or len(X) != sampler.n:
        raise ValueError(
            f"expected X [N, d], y [N] and theta [d] with the sampler's N = {sampler.n}, "
            f"got {tuple(X.shape)}, {tuple(y.shape)} and {tuple(theta.shape)}"
        )
    i, p, _ = sampler.sample(torch.cat([theta, theta.new_tensor([-1.0])]), fold=fold)
    return 2 * (theta @ X[i] - y[i]) * X[i] / ((sampler.n if fold else sampler.n_entries) * p)
