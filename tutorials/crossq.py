"""CrossQ and SAC in Keras, on TensorFlow and JAX: one file to take along.

Needs keras, numpy and gymnasium, and a layer to normalize with:

    episodes = train("Pendulum-v1", keras_renorm.BatchNormalization, 1e-3)

An off-policy agent learns from its own guesses: the value of an action is the
reward plus the value of the next one. SAC (Haarnoja et al. 2018,
arXiv:1812.05905) takes the latter from target networks, slow copies of its
critics. CrossQ (Bhatt et al., ICLR 2024, arXiv:1902.05605) has none. Its
critics are normalized, and one pass sees both pairs: (s, a) and (s', a').
"""

import functools
import itertools

import gymnasium
import keras
import numpy as np
from keras import layers, ops

RANDOM_STEPS = 500

# --- What differs between TensorFlow and JAX
#
# A step reads and assigns Keras variables. TensorFlow makes a graph of it as it
# is. A function that JAX compiles must be pure: there variables live in a
# `StatelessScope`, values go in and values come out. On JAX what
# `BatchRenormalization` remembers of gradients arrives as gradients of its own,
# which Keras's optimizers add by themselves.

if keras.backend.backend() == "jax":
    import jax

    def compiled(function, variables):
        """`function`, compiled; it may read and assign `variables`."""

        @functools.partial(jax.jit, donate_argnums=0)
        def pure(values, *arrays):
            known = list(zip(variables, values, strict=True))
            with keras.StatelessScope(known) as scope:
                result = function(*arrays)
            return result, list(map(scope.get_current_value, variables))

        def call(*arrays):
            result, values = pure([each.value for each in variables], *arrays)
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            return result

        return call

    def minimize(loss, optimizer, trained, variables):
        """A step of `optimizer` down `loss()`, which may assign `variables`."""
        known = [(each, each.value) for each in variables]
        ids = set(map(id, trained))
        moved = [each for each in variables if id(each) not in ids]

        def pure(values):
            replaced = zip(trained, values, strict=True)
            with keras.StatelessScope([*known, *replaced]) as scope:
                value = loss()
            return value, list(map(scope.get_current_value, moved))

        (value, after), gradients = jax.value_and_grad(pure, has_aux=True)(
            [each.value for each in trained]
        )
        for variable, new in zip(moved, after, strict=True):
            variable.assign(new)
        optimizer.apply(gradients, trained)
        return value

elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def compiled(function, variables):
        """`function`, compiled; it may read and assign `variables`."""
        return tf.function(function)

    def minimize(loss, optimizer, trained, variables):
        """A step of `optimizer` down `loss()`, which may assign `variables`."""
        with tf.GradientTape() as tape:
            value = loss()
        optimizer.apply(tape.gradient(value, trained), trained)
        return value

else:
    raise ImportError(
        "Needs Keras's TensorFlow or JAX backend. Received: KERAS_BACKEND="
        f"{keras.backend.backend()}."
    )


# --- Networks: normalized where sbx does it, at the input and after each ReLU


def make_critics(observations, actions, width, normalization):
    """Two critics side by side, which share no weight: `(batch, 2, 1)`."""
    # Keras takes the first axis of a kernel for a part of its fan.
    glorot = keras.initializers.VarianceScaling(2.0, "fan_avg", "uniform")
    per_critic = functools.partial(
        layers.EinsumDense,
        "bci,cio->bco",
        bias_axes="co",
        kernel_initializer=glorot,
    )
    inputs = keras.Input((observations,)), keras.Input((actions,))
    x = layers.Concatenate()(inputs)
    x = normalization()(x) if normalization else x
    x = layers.Dense(2 * width, activation="relu")(x)
    x = normalization()(x) if normalization else x
    x = layers.Reshape((2, width))(x)
    x = per_critic((2, width), activation="relu")(x)
    x = layers.Flatten()(x)
    x = normalization()(x) if normalization else x
    x = layers.Reshape((2, width))(x)
    return keras.Model(inputs, per_critic((2, 1))(x))


def make_actor(observations, actions, width):
    """Means and logarithms of standard deviations, side by side."""
    return keras.Sequential(
        [
            keras.Input((observations,)),
            layers.Dense(width, activation="relu"),
            layers.Dense(width, activation="relu"),
            layers.Dense(2 * actions),
        ]
    )


def choose(actor, observations, noise):
    """Actions between -1 and 1, and the logarithms of their densities."""
    mean, log_stddev = ops.split(actor(observations), 2, axis=-1)
    log_stddev = ops.clip(log_stddev, -20.0, 2.0)
    raw = mean + ops.exp(log_stddev) * noise
    # log(1 - tanh(raw)^2), without a difference of numbers near 1
    slope = 2.0 * (np.log(2.0) - raw - ops.softplus(-2.0 * raw))
    density = -0.5 * (noise**2 + np.log(2 * np.pi)) - log_stddev - slope
    return ops.tanh(raw), ops.sum(density, axis=-1, keepdims=True)


# --- The agent


class Agent:
    """SAC with target networks where `normalization` is None, else CrossQ."""

    def __init__(
        self, observations, actions, normalization, rate, width, gamma=0.99
    ):
        make = functools.partial(
            make_critics, observations, actions, width, normalization
        )

        self.actor = make_actor(observations, actions, min(width, 256))
        self.critics = make()
        self.log_alpha = keras.Variable(0.0, name="log_alpha")
        self.targets = None
        if normalization is None:
            self.targets = make()
            self.targets.set_weights(self.critics.get_weights())
        self.gamma, self.target_entropy = gamma, -float(actions)
        # What learns: the critics, the actor, the weight of its entropy.
        self.parts = [
            self.critics.trainable_variables,
            self.actor.trainable_variables,
            [self.log_alpha],
        ]
        beta = 0.9 if normalization is None else 0.5
        self.optimizers = [
            keras.optimizers.Adam(rate, beta_1=beta) for _ in self.parts
        ]
        for optimizer, part in zip(self.optimizers, self.parts, strict=True):
            optimizer.build(part)
        owners = [self.critics, self.actor, *self.optimizers]
        owners += [self.targets] if self.targets else []
        self.variables = [self.log_alpha]
        self.variables += itertools.chain(*(each.variables for each in owners))
        self.learn = compiled(self._learn, self.variables)
        self.improve = compiled(self._improve, self.variables)
        self.act = compiled(self._act, self.actor.variables)

    def _act(self, observations, noise):
        return choose(self.actor, observations, noise)[0]

    def _learn(self, now, actions, rewards, then, goes_on, noise):
        """A step of the critics, and of the targets after them."""
        next_actions, density = choose(self.actor, then, noise)

        def loss():
            if self.targets:
                values = self.critics([now, actions])
                after = self.targets([then, next_actions])
            else:  # one pass: the same statistics for both
                both = self.critics(
                    [
                        ops.concatenate([now, then]),
                        ops.concatenate([actions, next_actions]),
                    ],
                    training=True,
                )
                values, after = ops.split(both, 2)
            after = ops.min(after, axis=1) - ops.exp(self.log_alpha) * density
            goal = ops.stop_gradient(rewards + self.gamma * goes_on * after)
            return ops.mean((values - goal[:, None]) ** 2)

        value = self._minimize(loss, 0)
        if self.targets:
            for slow, fast in zip(
                self.targets.variables, self.critics.variables, strict=True
            ):
                slow.assign(slow + 0.005 * (fast - slow))
        return value

    def _improve(self, now, noise):
        """A step of the actor, and of the weight of its entropy."""
        alpha = ops.exp(self.log_alpha)

        def loss():
            actions, density = choose(self.actor, now, noise)
            # In inference: one action has no statistics of its own.
            values = self.critics([now, actions], training=False)
            return ops.mean(alpha * density - ops.min(values, axis=1))

        def loss_of_alpha():
            _, density = choose(self.actor, now, noise)
            return -self.log_alpha * ops.mean(density + self.target_entropy)

        self._minimize(loss_of_alpha, 2)
        return self._minimize(loss, 1)

    def gap(self, now, actions, rewards, then, goes_on):
        """How far the critics' values in inference are off those in training.

        The actor climbs the former, the critics learn the latter. The standard
        deviation of their difference on (s, a) and (s', a'), over that of the
        values; 0 without normalization.
        """
        chosen = np.asarray(self.act(then, np.zeros_like(actions)))
        pairs = np.concatenate([now, then]), np.concatenate([actions, chosen])
        weights = self.critics.get_weights()
        trained = np.asarray(self.critics(pairs, training=True))
        self.critics.set_weights(weights)  # training moved the statistics
        inferred = np.asarray(self.critics(pairs, training=False))
        return float(np.std(trained - inferred) / np.std(inferred))

    def _minimize(self, loss, part):
        return minimize(
            loss, self.optimizers[part], self.parts[part], self.variables
        )


# --- The loop


def train(
    environment,
    normalization,
    rate,
    seed=0,
    steps=4_000,
    width=64,
    batch_size=128,
    observe=None,
):
    """Trains an agent: for each episode its last step and its return.

    After random actions, a step of the critics follows each one in the
    environment, and at every third (SAC: at each) one of the actor. `width` is
    of the critics; the actor is no wider than 256. `observe(step, agent, data)`
    is called after each step of the critics.
    """
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.standard_normal, dtype="float32")
    world = gymnasium.wrappers.RescaleAction(
        gymnasium.make(environment), np.float32(-1), np.float32(1)
    )
    (observations,) = world.observation_space.shape
    (actions,) = world.action_space.shape
    agent = Agent(observations, actions, normalization, rate, width)
    every = 1 if normalization is None else 3
    sizes = observations, actions, 1, observations, 1
    memory = [np.zeros((steps, size), "float32") for size in sizes]
    episodes, total = [], 0.0
    now, _ = world.reset(seed=seed)
    for step in range(steps):
        if step < RANDOM_STEPS:
            action = rng.uniform(-1, 1, actions).astype("float32")
        else:
            seen = now[None].astype("float32")
            action = np.asarray(agent.act(seen, draw((1, actions))))[0]
        then, reward, ended, cut, _ = world.step(action)
        transition = now, action, reward, then, not ended
        for column, value in zip(memory, transition, strict=True):
            column[step] = value
        total, now = total + reward, then
        if ended or cut:
            episodes.append((step + 1, total))
            total, (now, _) = 0.0, world.reset()
        if step >= RANDOM_STEPS:
            rows = rng.integers(step + 1, size=batch_size)
            data = [column[rows] for column in memory]
            agent.learn(*data, draw((batch_size, actions)))
            if step % every == 0:
                agent.improve(data[0], draw((batch_size, actions)))
            if observe:
                observe(step, agent, data)
    world.close()
    return np.array(episodes)
