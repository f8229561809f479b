"""What the chapters on generative adversarial networks share: networks, the loop of the two players, toy data and scores."""
