r"""Mixture of softmaxes (yang2018breaking).

A language model ends in a softmax: a state of $d$ numbers, times a matrix of word vectors. Whatever comes before, the matrix of
log-probabilities that such a model gives to many contexts and all words then has rank $d + 2$ at most ($d + 1$ if words have no bias). If language needs more, no
training finds it: a bottleneck. A mixture of softmaxes makes $K$ states out of one, turns each into a distribution with the same word vectors
and averages the distributions. The logarithm of the average is no longer a product of two thin matrices, and its rank has no such bound.

Equations:

With a state $h$ of the context $c$, word vectors $w_x$ and biases $b_x$,

$$ \begin{aligned}
   P(x \mid c) &= \sum_{k=1}^{K} \pi_k(c) \, \frac{\exp(w_x^T h_k(c) + b_x)}{\sum_{x'} \exp(w_{x'}^T h_k(c) + b_{x'})} , \\
   \pi(c) &= \operatorname{softmax}(U h) , \qquad h_k(c) = \tanh(V_k h + v_k) .
   \end{aligned} $$

In logarithms, as it is computed, $\log P = \operatorname{logsumexp}_k [\log \pi_k + \log \operatorname{softmax}(W h_k + b)]$.

The bottleneck: let $A_{cx} = \log P(x \mid c)$. For one softmax

$$ A = H W^T + \mathbf 1 b^T - z \mathbf 1^T , \qquad z_c = \log \sum_x \exp(w_x^T h_c + b_x) , $$

so the rank is at most $d + 1$ without the bias and $d + 2$ with it. Mixing the states first, $h' = \sum_k \pi_k h_k$ (a mixture of contexts),
is still one softmax and obeys the same bound.

Deviations from the paper:

1. The module is the output layer alone, for any state; the paper puts it on an AWD-LSTM whose size is reduced so that the parameters
   stay equal.
2. Dropout on the latent states, which the paper uses, is left to the caller.

Later work: Ganea et al. (2019, "Breaking the softmax bottleneck via learnable monotonic nonlinearities") get a high rank with one softmax and a
learnt function of its logits, at less cost, and find that rank alone does not explain the gain. Grivas et al. (2022,
"Low-rank softmax can have unargmaxable classes in theory but rarely in practice") look at the other consequence of a low rank, words that can
never be the most probable one, and find few in practice. Large language models have a $d$ of thousands and one softmax; Godey et al. (2024, "Why do
small language models underperform?") meet the bottleneck again in the small ones.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.mixture_of_softmaxes import MixtureOfSoftmaxes, log_prob_rank

    logits = 0.3 * torch.randn(60, 24) @ torch.randn(24, 60)
    target = logits.log_softmax(1)  # the next word's log-probabilities in 60 contexts
    heads = {"one softmax": nn.Sequential(nn.Linear(8, 60), nn.LogSoftmax(-1))}
    heads["mixture"] = MixtureOfSoftmaxes(8, 60, n_experts=8)  # the method, in its place
    for name, head in heads.items():
        contexts = nn.Parameter(torch.randn(60, 8))  # stand for the states of a recurrent network
        optimizer = torch.optim.Adam([*head.parameters(), contexts], lr=0.03)
        for step in range(300):
            loss = (target.exp() * (target - head(contexts))).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rank = log_prob_rank(head.double()(contexts.double()))
        print(f"{name}: rank {rank}, divergence {loss:.3f}")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

__all__ = ["MixtureOfSoftmaxes", "log_prob_rank"]


class MixtureOfSoftmaxes(nn.Module):
    r"""Output layer $\log P = \operatorname{logsumexp}_k [\log \pi_k + \log \operatorname{softmax}(W \tanh(V_k h + v_k) + b)]$.

    The output is log-probabilities, not logits. It goes into `nll_loss`, or into `cross_entropy` just as well, since a log-softmax changes nothing
    of numbers that are normalised already.

    The states $h_k$ lie between -1 and 1. If `decoder.weight` is tied to an embedding, start that wide enough, for instance uniformly in
    [-0.5, 0.5]: with word vectors within 0.1 all words begin almost equally probable, little gradient comes back through the additional layer,
    and a short training ends far behind a plain softmax.

    Args:
        d_model: width of the state.
        n_tokens: size of the vocabulary.
        n_experts: number of softmaxes $K$.
        d_latent: width of the states $h_k$; None: that of the state.
        bias: give each word a bias.

    Attributes:
        prior: $U$, ``d_model -> K``, without bias.
        latent: all $V_k$ at once, ``d_model -> K * d_latent``.
        decoder: word vectors, ``d_latent -> n_tokens``; set its weight to that of an embedding to tie them.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_model: int, n_tokens: int, n_experts: int = 15, d_latent: int | None = None, bias: bool = True):
        super().__init__()
        d_latent = d_model if d_latent is None else d_latent
        if min(d_model, n_tokens, n_experts, d_latent) < 1:
            raise ValueError(
                f"sizes must be at least 1, got d_model={d_model}, n_tokens={n_tokens}, n_experts={n_experts}, d_latent={d_latent}"
            )
        self.d_model, self.n_experts = d_model, n_experts
        self.prior = nn.Linear(d_model, n_experts, bias=False)
        self.latent = nn.Linear(d_model, n_experts * d_latent)
        self.decoder = nn.Linear(d_latent, n_tokens, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        """Log-probabilities ``[..., n_tokens]`` of states ``[..., d_model]``.

        Raises:
            ValueError: states of another width.
        """
        if h.shape[-1] != self.d_model:
            raise ValueError(f"expected states [..., {self.d_model}], got {tuple(h.shape)}")
        experts = torch.tanh(self.latent(h)).unflatten(-1, (self.n_experts, -1))  # [..., K, d_latent]
        logp = log_softmax(self.decoder(experts), -1)  # [..., K, n_tokens]
        # In log space: a sum of probabilities would underflow for rare words.
        return torch.logsumexp(log_softmax(self.prior(h), -1)[..., None] + logp, -2)


def log_prob_rank(logp: Tensor, rtol: float = 1e-5) -> int:
    r"""Numerical rank of log-probabilities ``[N, V]``: singular values above `rtol` times the largest, in float64.

    Rounding is a full-rank error, so the network that made `logp` should have run in float64 too.

    Args:
        logp: one row a context.
        rtol: relative tolerance, in (0, 1).

    Raises:
        ValueError: not a matrix, entries that are not finite, or a tolerance outside (0, 1).
    """
    if logp.dim() != 2 or not logp.numel() or not torch.isfinite(logp).all():
        raise ValueError(f"expected a matrix [contexts, tokens] of finite log-probabilities, got {tuple(logp.shape)}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must be in (0, 1), got {rtol}")
    values = torch.linalg.svdvals(logp.detach().double())
    return int((values > rtol * values[0]).sum())
