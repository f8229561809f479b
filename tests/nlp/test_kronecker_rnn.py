"""Kronecker products against torch.kron, the penalty against dense formulas, the unit against a NumPy transcription."""

import numpy as np
import pytest
import torch

from dlatlas.nlp.kronecker_rnn import KRU, kron_apply, singular_values, soft_unitary_penalty

C128, F64 = torch.complex128, torch.float64


def dense(factors):
    W = factors[0]
    for f in factors[1:]:
        W = torch.kron(W, f)
    return W


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), (4, 1)], [(3, 2), (2, 2), (1, 4)], [(2, 2)] * 4])
def test_apply_against_the_dense_product(dtype, shapes):
    factors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    W = dense(factors)
    for batch in ((), (5,), (2, 3)):
        x = torch.randn(*batch, W.shape[1], dtype=dtype)
        torch.testing.assert_close(kron_apply(factors, x), x @ W.T)


def test_apply_mixes_real_and_complex():
    factors, x = [torch.randn(2, 2, dtype=C128), torch.randn(3, 3, dtype=C128)], torch.randn(4, 6, dtype=F64)
    torch.testing.assert_close(kron_apply(factors, x), x.to(C128) @ dense(factors).T)


@pytest.mark.parametrize("complex", [True, False])
def test_unitary_factors(complex):
    unit = KRU(2, (2, 3, 2), complex=complex).double()
    factors = [torch.linalg.qr(W.detach())[0] for W in unit.factors]
    assert factors[0].is_complex() == complex
    x = torch.randn(5, 12, dtype=factors[0].dtype)
    torch.testing.assert_close(kron_apply(factors, x).norm(dim=1), x.norm(dim=1))
    assert soft_unitary_penalty(factors).item() == pytest.approx(0, abs=1e-24)
    torch.testing.assert_close(singular_values(factors), torch.ones(12, dtype=F64))
    start = KRU(2, (2, 3, 2), complex=complex)
    assert start.penalty().item() < 1e-10  # how a unit starts


def test_penalty_and_singular_values_against_numpy():
    factors = [torch.randn(3, 2, dtype=C128), torch.randn(2, 2, dtype=C128)]
    expected = sum(np.linalg.norm(W.conj().T @ W - np.eye(2)) ** 2 for W in (f.numpy() for f in factors))
    assert soft_unitary_penalty(factors).item() == pytest.approx(expected)
    assert not soft_unitary_penalty(factors).is_complex()
    np.testing.assert_allclose(singular_values(factors), np.linalg.svd(dense(factors).numpy())[1], atol=1e-12)
    real = [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
    assert soft_unitary_penalty(real).item() == 9


def test_gradients():
    factors = [torch.randn(2, 2, dtype=C128, requires_grad=True), torch.randn(3, 2, dtype=C128, requires_grad=True)]
    x = torch.randn(2, 4, dtype=C128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *f: soft_unitary_penalty(f), factors)
    assert torch.autograd.gradcheck(lambda x, *f: kron_apply(f, x), (x, *factors))
    for exact in (False, True):
        unit = KRU(2, (2, 2), exact=exact).double()
        with torch.no_grad():
            unit.shift.add_(0.3)
        x = torch.randn(1, 4, 2, dtype=F64, requires_grad=True)
        params = list(unit.parameters())
        names = [name for name, _ in unit.named_parameters()]
        run = lambda x, *values: torch.func.functional_call(unit, dict(zip(names, values)), (x,))[0]  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (x, *params))


def numpy_kru(unit, x, h):
    W = dense(unit.factors).detach().numpy()
    U, b = unit.input.weight.detach().numpy(), unit.input.bias.detach().numpy()
    out = []
    for x_t in x:
        drive = U @ x_t + b
        if unit.complex:
            drive = drive[: unit.n] + 1j * drive[unit.n :]
        h = W @ h + drive
        if unit.activation == "relu":
            h = np.maximum(h.real, 0) + 1j * np.maximum(h.imag, 0) if unit.complex else np.maximum(h, 0)
        else:
            h = h / np.abs(h) * np.maximum(np.abs(h) + unit.shift.detach().numpy(), 0)
        out.append(np.concatenate([h.real, h.imag]) if unit.complex else h)
    return np.stack(out)


@pytest.mark.parametrize("complex", [True, False])
@pytest.mark.parametrize("activation", ["modrelu", "relu"])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (2,) * 5, (9, 2)])
def test_unit_against_numpy(complex, activation, sizes):
    unit = KRU(3, sizes, complex, activation=activation).double()
    with torch.no_grad():
        for p in unit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 7, 3, dtype=F64)
    out, state = unit(x)
    assert out.shape == (2, 7, unit.n * (2 if complex else 1)) and not out.is_complex()
    for k in range(2):
        np.testing.assert_allclose(out[k].detach(), numpy_kru(unit, x[k].numpy(), np.zeros(unit.n)), atol=1e-12)
    assert torch.equal(state, out[:, -1])
    first, middle = unit(x[:, :3])
    torch.testing.assert_close(torch.cat([first, unit(x[:, 3:], middle)[0]], 1), out)


def test_without_input_a_unitary_unit_keeps_its_norm_for_ever():
    unit = KRU(2, (2, 2, 2)).double()
    with torch.no_grad():
        unit.input.bias.zero_()
        for raw, W in zip(unit.raw, unit.factors):
            raw.copy_(torch.view_as_real(torch.linalg.qr(W)[0]))
    start = torch.randn(3, 16, dtype=F64)
    out, _ = unit(torch.zeros(3, 500, 2, dtype=F64), start)
    torch.testing.assert_close(out[:, -1].norm(dim=1), start.norm(dim=1))


def train(unit, weight, steps=30):
    optimizer = torch.optim.Adam(unit.parameters(), lr=3e-2)
    x, y = torch.randn(8, 6, 2), torch.randn(8, 2 * unit.n)
    for _ in range(steps):
        loss = (unit(x)[0][:, -1] - y).square().mean() + weight * unit.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


def test_exact_factors_stay_unitary_through_training_and_the_penalty_keeps_them_near():
    exact, soft, free = KRU(2, (2, 3, 2), exact=True), KRU(2, (2, 3, 2)), KRU(2, (2, 3, 2))
    before = [W.detach().clone() for W in exact.factors]
    first = train(exact, 0, steps=1)
    assert train(exact, 0, steps=60) < first
    for unit, weight in ((soft, 1.0), (free, 0.0)):
        train(unit, weight)
    spread = {name: (singular_values(u.factors) - 1).abs().max().item() for name, u in (("exact", exact), ("soft", soft), ("free", free))}
    assert spread["exact"] < 20 * torch.finfo(torch.float32).eps
    assert spread["soft"] < 0.1 < spread["free"]
    assert all((W - old).abs().max() > 0.1 for W, old in zip(exact.factors, before))


def test_numbers_of_parameters():
    assert KRU(3).recurrent_parameters == 8 * 6 == 4 * 6 * 2
    assert KRU(3, complex=False).recurrent_parameters == 4 * 6
    assert KRU(3).n == 64 and 64**2 / KRU(3).recurrent_parameters > 80


def test_random_start_is_uniform_over_the_orthogonal_matrices():
    """The trace of a uniform 2 x 2 orthogonal matrix is 0 in half of the draws (reflections), and its first entry has variance 1/2."""
    draws = torch.stack([KRU(1, (2,), complex=False).factors[0].detach() for _ in range(1500)])
    assert (draws.diagonal(dim1=1, dim2=2).sum(1).abs() < 1e-5).double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert draws[:, 0, 0].mean().abs() < 0.05 and draws[:, 0, 0].var().item() == pytest.approx(0.5, abs=0.03)


def test_state_dict_round_trip():
    for exact in (False, True):
        one, two = KRU(2, (2, 2), exact=exact), KRU(2, (2, 2), exact=exact)
        two.load_state_dict(one.state_dict())
        x = torch.randn(1, 4, 2)
        assert torch.equal(one(x)[0], two(x)[0])


def test_bad_calls():
    for factors in ([], [torch.ones(2)]):
        for f in (lambda m: kron_apply(m, torch.ones(2)), soft_unitary_penalty, singular_values):
            with pytest.raises(ValueError, match="at least one matrix"):
                f(factors)
    with pytest.raises(ValueError, match=r"last dimension of 6, got \(2, 5\)"):
        kron_apply([torch.ones(2, 2), torch.ones(2, 3)], torch.ones(2, 5))
    for bad in ({"factor_sizes": ()}, {"factor_sizes": (2, 0)}, {"d_in": 0}, {"activation": "tanh"}):
        with pytest.raises(ValueError, match="expected sizes of at least 1"):
            KRU(**{"d_in": 2} | bad)
    unit = KRU(2, (2, 2))
    with pytest.raises(ValueError, match=r"\[B, T >= 1, 2\]"):
        unit(torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match=r"state \(1, 8\), got \(1, 4\)"):
        unit(torch.ones(1, 4, 2), torch.ones(1, 4))
