"""Every method that another library also has gives the same numbers."""

import pytest
import torch

from dlatlas import catalog
from dlatlas.book import peers


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: f"{peer.key}: {peer.what}")
def test_the_difference_is_within_what_is_allowed(peer):
    assert catalog.papers()[peer.key].implemented
    ((_, difference),) = peers.measure([peer])
    assert difference <= peer.tolerance


def test_a_difference_is_seen_and_measuring_leaves_the_random_numbers_alone():
    off = peers.Peer("x", "a sum", "another", 0.1, "a mistake", lambda: (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])))
    state = torch.get_rng_state()
    assert peers.measure([off]) == [(off, 0.5)]
    peers.measure([peers.PEERS[0]])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="shapes"):
        peers.measure([peers.Peer("x", "a sum", "another", 0.1, "", lambda: (torch.zeros(2), torch.zeros(3)))])
