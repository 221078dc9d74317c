"""How a training or an inference step is computed. Layers own the variables."""
