"""What several parts of the library share: networks, flat parameters, kernels and metrics."""
