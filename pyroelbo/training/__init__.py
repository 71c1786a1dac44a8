"""Training loops: ``fit`` by gradients, ``fit_em`` by expectation and maximization."""
