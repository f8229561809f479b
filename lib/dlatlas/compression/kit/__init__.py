"""What the compression chapters share: straight-through gradients, quantised layers, networks, text, kernels and timing."""
