"""Reinforcement learning: the agents of tutorial 12, after equal steps.

    python -m benchmarks.real.reinforcement               # time of a step
    KERAS_BACKEND=jax python -m benchmarks.real.reinforcement

All contenders have one rate, the default of Keras's Adam, so nothing is chosen.
That Algorithm 1 and which momentum are contenders was seen with seed 1000.
"""

import functools
import importlib
import sys
from pathlib import Path

import keras
import numpy as np

import keras_renorm
from benchmarks import timing

TITLE = "Reinforcement learning on Pendulum-v1"
MEASURES = {
    "last": ("return, mean of the last ten episodes", "high"),
    "all": ("return, mean of all episodes", "high"),
    "gap": ("critics, training less inference, share of their spread", "low"),
}
SETTINGS = {"Pendulum-v1": "after 4,000 steps"}
RATES = (1e-3,)
SEEDS = 5
STEPS, QUICK_STEPS = 4_000, 800
NEEDS = "gymnasium"

_RENORM = keras_renorm.BatchRenormalization
_KERAS = keras.layers.BatchNormalization
_ALGORITHM_1 = functools.partial(_RENORM, gradient_momentum=None)
_NORMALIZATIONS = {
    "sac": None,
    "bn": _KERAS,
    "bn_faster": functools.partial(_KERAS, momentum=0.95),
    "keras_renorm": functools.partial(_KERAS, renorm=True),
    "ours": _RENORM,
    "algorithm_1": _ALGORITHM_1,
    "faster": functools.partial(_ALGORITHM_1, momentum=0.95),
}
CONTENDERS = {
    "sac": "SAC: target networks, no normalization",
    "bn": "CrossQ, Keras's batch normalization",
    "bn_faster": "the same, `momentum=0.95`",
    "keras_renorm": "CrossQ, Keras's `renorm=True`",
    "ours": "CrossQ, `BatchRenormalization()`",
    "algorithm_1": "CrossQ, Algorithm 1 (`gradient_momentum=None`)",
    "faster": "the same, `momentum=0.95`",
}


@functools.cache
def _crossq():
    """The module of the tutorial."""
    folder = str(Path(__file__).parents[2] / "tutorials")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("crossq")


def train(setting, contender, rate, seed, is_tuning):
    """Returns of one agent, and the gap each 500 steps."""
    gaps = []

    def observe(step, agent, data):
        if step % 500 == 499:
            gaps.append(agent.gap(*data))

    episodes = _crossq().train(
        setting,
        _NORMALIZATIONS[contender],
        rate,
        seed,
        STEPS,
        observe=observe,
    )
    returns = episodes[:, 1]
    return {
        "last": float(returns[-10:].mean()),
        "all": float(returns.mean()),
        "gap": float(np.mean(gaps)),
        "returns": returns.round(1).tolist(),
        "gaps": gaps,
    }


def time_of_a_step(width, batch_size, seconds=20):
    """Of the critics, beside that with Keras's batch normalization."""
    rng = np.random.default_rng(0)
    data = [
        keras.ops.convert_to_tensor(
            rng.standard_normal((batch_size, size)), "float32"
        )
        for size in (3, 1, 1, 3, 1, 1)
    ]

    def step(agent):
        return lambda: np.asarray(agent.learn(*data))

    agents = {
        name: step(_crossq().Agent(3, 1, _NORMALIZATIONS[name], 1e-3, width))
        for name in ("bn", "sac", "keras_renorm", "ours", "algorithm_1")
    }
    return timing.ratios(timing.interleaved(agents, seconds, settle=5), "bn")


if __name__ == "__main__":
    for width, batch_size in ((64, 128), (256, 256)):
        for name, ratio in time_of_a_step(width, batch_size).items():
            print(
                f"{keras.backend.backend()}, width {width}, minibatch "
                f"{batch_size}, {name}: {ratio['milliseconds']:.2f} ms, "
                f"{ratio['median']:.2f} x"
            )
