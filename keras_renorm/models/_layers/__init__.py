"""Finding the layers of a model, and what belongs to a layer."""
