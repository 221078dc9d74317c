# %% [markdown]
# # Reinforcement learning without target networks
#
# An off-policy agent learns from its own guesses: the value of an action is
# the reward plus the value of the next one. SAC takes the latter from target
# networks, slow copies of its critics. CrossQ (Bhatt et al., ICLR 2024,
# arXiv:1902.05605) needs none: its critics are normalized, and *one* pass sees
# both (s, a) and (s', a'). `crossq.py` has both agents, in `keras.ops`, with
# steps compiled on TensorFlow and (`KERAS_BACKEND=jax`) on JAX: one file to
# take along.
#
# Which normalization? Keras's batch normalization, its `renorm=True`, or
# `keras_renorm.BatchRenormalization`, on gymnasium's `Pendulum-v1`, in a few
# minutes on two CPU cores. MuJoCo: `pip install "gymnasium[mujoco]"`, and
# `--environment HalfCheetah-v5 --steps 300000 --width 2048 --batch-size 256`.
# Needs `pip install ".[tutorials,reinforcement]"`.

# %%
import lesson

SEEDS, STEPS = 2, 4_000
args = lesson.options(
    "12_reinforcement_learning",
    environment="Pendulum-v1",
    seeds=SEEDS,
    steps=STEPS,
    rate=1e-3,
    width=64,
    batch_size=128,
    least={"steps": 600},
    notes={
        "environment": "of gymnasium; its actions must be numbers",
        "rate": "of learning",
        "width": "of the critics",
    },
)

# %%
import functools
import inspect

import crossq
import keras
import numpy as np

import keras_renorm

# %% [markdown]
# ## The pass over both
#
# Statistics of (s, a) alone would not suit (s', a'): other actions were chosen
# there. In one pass both are normalized by the same statistics.

# %%
lesson.say(inspect.getsource(crossq.Agent._learn))

# %% [markdown]
# ## Train
#
# `BatchRenormalization` with momentum 0.95 and as Algorithm 1 of the paper,
# which corrects always. As it comes it would measure that 128 random pairs need
# no correction, and be batch normalization. But here the *network* moves, and
# moving statistics lag behind it: the actor, which climbs the critics in
# inference, would climb others than those that learn. We measure by how much:
# `gap` is the standard deviation of the difference, over that of the values.

# %%
KERAS = keras.layers.BatchNormalization
AGENTS = {
    "SAC, target networks": None,
    "CrossQ, Keras BN": KERAS,
    "CrossQ, Keras renorm": functools.partial(KERAS, renorm=True),
    "CrossQ, renorm": functools.partial(
        keras_renorm.BatchRenormalization,
        momentum=0.95,
        gradient_momentum=None,
    ),
}


def train(normalization, seed):
    gaps = []

    def observe(step, agent, data):
        if step % 500 == 499 or step == args.steps - 1:
            gaps.append(agent.gap(*data))

    episodes = crossq.train(
        args.environment,
        normalization,
        args.rate,
        seed,
        args.steps,
        args.width,
        args.batch_size,
        observe,
    )
    return episodes, np.mean(gaps)


runs = lesson.of_all_seeds(
    {name: (normalization,) for name, normalization in AGENTS.items()},
    args.seeds,
    train,
)

# %% [markdown]
# ## What came of it
#
# A return is the sum of the rewards of an episode: -1,500 where the pendulum
# hangs, about -150 where it is swung up and held.

# %%
lesson.table(
    "The last ten episodes",
    ("agent", "mean return", "gap"),
    [
        (
            name,
            lesson.numbers((e[-10:, 1].mean() for e, _ in of), ".0f"),
            lesson.numbers((gap for _, gap in of), ".2f"),
        )
        for name, of in runs.items()
    ],
)
if not args.is_whole:
    lesson.say("Too few steps to learn much: see --steps")

# %%
colors = lesson.GREY, lesson.ORANGE, lesson.YELLOW, lesson.BLUE
picture = lesson.figure(9, 5)
axes = picture.subplots()
for (name, of), color in zip(runs.items(), colors, strict=True):
    for at, (episodes, _) in enumerate(of):
        label = None if at else name
        axes.plot(*episodes.T, color=color, lw=1.5, label=label)
axes.set(title="A line for each seed", xlabel="step", ylabel="return")
axes.grid(axis="y", alpha=0.3)
lesson.legend(axes, ncols=2)
lesson.save(picture, args.output / "returns.png")

# %% [markdown]
# ## What we claim
#
# CrossQ learns without target networks: it swings the pendulum up. With
# renormalization the critics are the same in training and in inference.

# %%
if args.is_whole and args.environment == "Pendulum-v1":
    for episodes, gap in runs["CrossQ, renorm"]:
        assert episodes[-5:, 1].max() > -400
        assert gap < 0.02
    assert min(gap for _, gap in runs["CrossQ, Keras BN"]) > 0.05
    lesson.say("All claims hold")
