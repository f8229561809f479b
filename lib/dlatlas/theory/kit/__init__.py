"""What the theory chapters share: curvature, Gaussian expectations and their networks."""
