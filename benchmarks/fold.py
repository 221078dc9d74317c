"""What folding saves: inference of whole networks.

    python benchmarks/fold.py            # about 3 minutes on two cores
    python benchmarks/fold.py --quick    # half a minute

Networks of `keras.applications` as they are, converted, and folded, each as a
graph, take turns in one process; figures are medians of ratios to the network
as it is, with the lowest and the highest. Images are 224 x 224.

Prints a table and writes JSON into `--output`.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
import timing
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_renorm

NETWORKS = ("ResNet50", "MobileNetV2", "EfficientNetB0")
BATCH_SIZES = (1, 16)
BASELINE = "Keras"


def inference_of(model, images):
    """A function that runs a network on images."""
    run = tf.function(lambda x: model(x, training=False), autograph=False)

    def infer():
        run(images).numpy()

    return infer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output/speed"))
    options = parser.parse_args()
    console = Console()
    results = {}
    cases = [
        (name, size)
        for name in NETWORKS[: 1 if options.quick else None]
        for size in BATCH_SIZES[: 1 if options.quick else None]
    ]
    for name, size in track(cases, "Folded networks", console=console):
        model = getattr(keras.applications, name)(weights=None)
        converted = keras_renorm.convert(model)
        networks = {
            BASELINE: model,
            "converted": converted,
            "folded": keras_renorm.fold(converted),
        }
        images = tf.random.normal((size, 224, 224, 3))
        times = timing.interleaved(
            {
                label: inference_of(network, images)
                for label, network in networks.items()
            },
            1 if options.quick else 20,
        )
        results[f"{name}, batch {size}"] = timing.ratios(times, BASELINE)
    table = Table("network", "Keras, ms", title="Inference in a graph")
    for label in ("converted", "folded"):
        table.add_column(label, justify="right")
    for name, ratios in results.items():
        table.add_row(
            name,
            f"{ratios[BASELINE]['milliseconds']:.1f}",
            *(
                f"{value['median']:.2f} ({value['min']:.2f}-{value['max']:.2f})"
                for label, value in ratios.items()
                if label != BASELINE
            ),
        )
    console.print(table)
    path = options.output / "fold_cpu.json"
    timing.write(path, {"machine": timing.machine(), "cases": results})
    console.print(f"Written: {path}")


if __name__ == "__main__":
    main()
