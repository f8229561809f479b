"""Networks of the adversarial chapters: shapes, ranges and what they must not contain."""

import pytest
import torch
from torch import nn

from dlatlas.gans.kit.nets import DigitCritic, DigitGenerator, conv28_critic, conv28_generator, mlp


def test_the_generator_makes_images_in_range():
    G = DigitGenerator(z_dim=5, out=(1, 4, 6), width=7)
    x = G(10 * torch.randn(9, 5))
    assert x.shape == (9, 1, 4, 6) and x.abs().max() <= 1 and x.std() > 0


def test_labels_change_the_image():
    G = DigitGenerator(z_dim=5, width=16, n_classes=3).eval()
    z = torch.randn(1, 5).expand(3, 5)
    x = G(z, torch.arange(3))
    assert not torch.allclose(x[0], x[1])
    torch.testing.assert_close(x[:1], G(z[:1], torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match="3 classes and got no labels"):
        G(z)
    with pytest.raises(ValueError, match="no classes"):
        DigitGenerator(z_dim=5)(z, torch.arange(3))


def test_the_critic_scores_and_shows_its_last_hidden_layer():
    D = DigitCritic((1, 8, 8), width=12, out=3, features=True)
    scores, h = D(torch.randn(5, 1, 8, 8))
    assert scores.shape == (5, 3) and h.shape == (5, 12) and torch.equal(scores, D.head(h))
    assert DigitCritic()(torch.randn(5, 1, 8, 8)).shape == (5, 1)


@pytest.mark.parametrize("critic", [DigitCritic((1, 28, 28)), conv28_critic(4)])
def test_a_critics_score_depends_on_its_own_example_only(critic):
    x = torch.randn(6, 1, 28, 28)
    torch.testing.assert_close(critic(x)[:2], critic(x[:2]))


def test_convolutional_pair():
    x = conv28_generator(10, ch=4)(torch.randn(3, 10))
    assert x.shape == (3, 1, 28, 28) and x.abs().max() <= 1
    assert conv28_critic(4)(x).shape == (3, 1)


def test_mlp_is_leaky():
    assert any(isinstance(m, nn.LeakyReLU) and m.negative_slope == 0.2 for m in mlp([2, 3, 1]))
    assert isinstance(mlp([2, 3, 1], final="tanh")[-1], nn.Tanh)


@pytest.mark.parametrize("make", [lambda: DigitGenerator(z_dim=0), lambda: DigitGenerator(n_classes=0), lambda: DigitCritic(width=0)])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()
