"""Timing that a noisy machine cannot fool: interleaved, repeated, as ratios."""

import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def interleaved(
    functions, seconds, settle=2, clock=time.perf_counter, prepare=None
):
    """Seconds a call of each function, by a clock: arrays, one value a round.

    All functions take turns within each round, so that what else the machine
    does hits them alike. `functions` maps names to callables that return when
    their work is done. `prepare` maps names to what is called before a turn,
    and not timed.
    """
    prepare = prepare or {}
    for function in functions.values():
        for _ in range(settle):
            function()
    fastest = min(_time(function, 1, clock) for function in functions.values())
    repeats = max(1, round(0.01 / fastest))
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while len(times[next(iter(times))]) < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            if name in prepare:
                prepare[name]()
            # Once for what the one before left behind: cold caches, memory
            # given back to the system.
            function()
            times[name].append(_time(function, repeats, clock))
    return {name: np.array(values) for name, values in times.items()}


def _time(function, repeats, clock):
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def ratios(times, baseline):
    """Per function: median, min and max of its time over the baseline's."""
    result = {}
    for name, values in times.items():
        ratio = values / times[baseline]
        result[name] = {
            "median": float(np.median(ratio)),
            "min": float(ratio.min()),
            "max": float(ratio.max()),
            "milliseconds": float(np.median(values) * 1e3),
        }
    return result


def copier(source):
    """A function that copies an array on all cores, and does nothing else."""
    target = np.empty_like(source)
    parts = _cores() if source.nbytes > 2**20 else 1
    pairs = list(
        zip(
            np.array_split(target.reshape(-1), parts),
            np.array_split(source.reshape(-1), parts),
            strict=True,
        )
    )
    if parts == 1:
        return lambda: np.copyto(*pairs[0])
    pool = ThreadPoolExecutor(parts)
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def machine():
    """What the figures were measured on."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": _cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **_versions(
            *("keras", "tensorflow", "jax", "torch"),
            *("tf_keras", "keras_renorm"),
        ),
    }


def _versions(*packages):
    """Versions of those that this process has imported."""
    return {
        name: sys.modules[name].__version__
        for name in packages
        if name in sys.modules
    }


def write(path, content):
    """Writes JSON, keys in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
