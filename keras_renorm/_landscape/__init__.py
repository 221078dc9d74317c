"""The loss around the weights of a model, along its gradient.

All functions take the training loss: the loss of one batch plus the penalties
of the layers (regularizers, `add_loss`), as `fit` minimizes it. θ are the
trainable weights, g(θ) is the gradient there, η a step size.

Nothing of the model changes, at any time: weights, moving statistics, step
counters and seeds are read once, and handed on as values. Each point of a line
starts from the same ones, so dropout is the same at every point.

A model is traced at the first call, and again after a change of its layers'
attributes, of the loss or of the shapes of the batch. Call these functions
outside the scope of a distribution strategy; the model may be made inside.

Noise that comes from elsewhere than a `keras.random.SeedGenerator` is out of
reach.

What is not finite is returned as it is: a landscape at large steps has such
points. There is no loss scaling: under a float16 policy gradients may
underflow to zero, or overflow, and results that depend on them are NaN or
infinite then.
"""
