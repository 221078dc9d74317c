"""What learns a task: networks of few filters, each normalized throughout."""

import keras
from keras import layers

FILTERS = (16, 32, 64)


def make(task, normalization):
    """A network for `task`; `normalization()` makes each of its layers."""
    return NETWORKS[task.network](task, normalization)


def _stack(task, begin, layer_of, end, normalization):
    stack = [keras.Input(task.train.x.shape[1:]), *begin]
    for filters, strides in zip(FILTERS, task.strides, strict=True):
        stack += [layer_of(filters, strides), normalization(), layers.ReLU()]
    return keras.Sequential([*stack, *end, layers.Dense(10)])


def _convolution(filters, strides=1, size=3):
    return layers.Conv2D(
        filters, size, strides=strides, padding="same", use_bias=False
    )


def _convolutions(task, normalization):
    """Three convolutions; ten classes."""
    pooling = layers.GlobalAveragePooling2D()
    return _stack(task, [], _convolution, [pooling], normalization)


def _dense(task, normalization):
    """Three dense layers; ten classes."""

    def layer_of(filters, strides):
        return layers.Dense(4 * filters, use_bias=False)

    return _stack(task, [layers.Flatten()], layer_of, [], normalization)


def _residual(task, normalization):
    """15 convolutions, all but the first in pairs with a way around them."""

    def normalized(x, filters, strides=1):
        return normalization()(_convolution(filters, strides)(x))

    inputs = keras.Input(task.train.x.shape[1:])
    x = layers.ReLU()(normalized(inputs, FILTERS[0]))
    for filters, first_strides in zip(FILTERS, task.strides, strict=True):
        for strides in (first_strides, 1, 1)[: 3 if filters == 16 else 2]:
            y = layers.ReLU()(normalized(x, filters, strides))
            y = normalized(y, filters)
            if x.shape[1:] != y.shape[1:]:
                x = _convolution(filters, strides, size=1)(x)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def _unet(task, normalization):
    """Down to a quarter of the size and up again, with a way across.

    Ten convolutions are normalized; two logits a pixel.
    """

    def normalized_twice(x, filters):
        for _ in range(2):
            x = layers.ReLU()(normalization()(_convolution(filters)(x)))
        return x

    x = inputs = keras.Input(task.train.x.shape[1:])
    across = []
    for filters in FILTERS[:-1]:
        x = normalized_twice(x, filters)
        across.append(x)
        x = layers.MaxPooling2D()(x)
    x = normalized_twice(x, FILTERS[-1])
    for filters in FILTERS[-2::-1]:
        x = layers.Concatenate()([layers.UpSampling2D()(x), across.pop()])
        x = normalized_twice(x, filters)
    return keras.Model(inputs, layers.Conv2D(2, 1)(x))


NETWORKS = {
    "convolutions": _convolutions,
    "dense": _dense,
    "residual": _residual,
    "unet": _unet,
}
