"""Steps that are chained inside one compiled loop of JAX: a device's time."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax


def chain(step, carry, given, length):
    """A loop of dependent steps, not yet compiled, and its arguments.

    `step(carry, given)` returns the next carry and a list of what it writes
    besides. What is given is read anew at each step, and what a step writes is
    written out at each.
    """

    def loop(carry, given):
        _, written = jax.eval_shape(step, carry, given)
        written = [jax.numpy.zeros(each.shape, each.dtype) for each in written]

        def body(state, _):
            carry, _ = state
            return step(*jax.lax.optimization_barrier((carry, given))), None

        return jax.lax.scan(body, (carry, written), length=length)[0]

    return jax.jit(loop).lower(carry, given), (carry, given)


def compiled(chains):
    """Name to a function that runs its chain; compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loops = pool.map(lambda made: made[0].compile(), chains.values())
        return {
            name: _runner(loop, arguments)
            for (name, (_, arguments)), loop in zip(
                chains.items(), loops, strict=True
            )
        }


def _runner(loop, arguments):
    return lambda: jax.block_until_ready(loop(*arguments))
