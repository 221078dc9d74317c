"""Digits of several colours: a dataset of three domains, made on the spot.

scikit-learn's digits (1,797 real images of 8x8 pixels), enlarged to 16x16 and
coloured. A configuration of the `tfds` dataset for each domain:

- `brown`: brown ink on cream paper, in good light;
- `dark_brown`: a third of the way to black;
- `black`: black ink on grey paper, in poor light: less contrast, more noise.

`brown` has 899 digits for training, the others the next 449. The test splits
hold the 449 that are left, the same ones in each colour. So no digit is in a
training split and in a test split.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

ENLARGE = 2
# Of the shuffled digits, from and to.
SOURCE_ROWS, TARGET_ROWS, TEST_ROWS = (0, 899), (899, 1348), (1348, 1797)

Color = tuple[float, float, float]  # red, green, blue, from 0 to 1


@dataclasses.dataclass
class Domain(tfds.core.BuilderConfig):
    """How a domain looks.

    Args:
        ink: Colour of a pixel that is all ink.
        paper: Colour of a pixel without ink.
        noise: Standard deviation of a pixel's noise; colours go from 0 to 1.
        rows: Which of the shuffled digits are for training, from and to.
    """

    ink: Color = (0.0, 0.0, 0.0)
    paper: Color = (1.0, 1.0, 1.0)
    noise: float = 0.0
    rows: tuple[int, int] = TARGET_ROWS


class ColoredDigits(tfds.core.GeneratorBasedBuilder):
    """Digits of several colours. What changes them must raise `VERSION`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        Domain(
            name="brown",
            ink=(0.45, 0.25, 0.10),
            paper=(0.95, 0.90, 0.78),
            noise=0.03,
            rows=SOURCE_ROWS,
        ),
        Domain(
            name="dark_brown",
            ink=(0.33, 0.19, 0.10),
            paper=(0.78, 0.75, 0.69),
            noise=0.04,
        ),
        Domain(
            name="black",
            ink=(0.06, 0.06, 0.10),
            paper=(0.40, 0.42, 0.50),
            noise=0.06,
        ),
    )

    def _info(self):
        size = 8 * ENLARGE
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        rows = np.random.default_rng(0).permutation(len(load_digits().target))
        return {
            "train": self._generate_examples(
                rows[slice(*self.builder_config.rows)]
            ),
            "test": self._generate_examples(rows[slice(*TEST_ROWS)]),
        }

    def _generate_examples(self, rows):
        digits, labels = load_digits(return_X_y=True)
        for row in map(int, rows):
            ink = digits[row].reshape(8, 8) / 16
            yield (
                row,
                {
                    # The light is the row's: whatever the order of the rows.
                    "image": color(
                        ink, self.builder_config, np.random.default_rng(row)
                    ),
                    "label": int(labels[row]),
                },
            )


def color(ink, domain, rng):
    """A digit as a domain shows it: bytes of red, green and blue.

    Args:
        ink: Share of ink, from 0 to 1, of shape `(8, 8)`.
        domain: The `Domain`.
        rng: The `numpy.random.Generator` of light and noise: each colour of
            an image is brighter or darker by some 5 %, and pixels are noisy.
    """
    ink = np.kron(ink, np.ones((ENLARGE, ENLARGE)))[..., None]
    image = ink * np.array(domain.ink) + (1 - ink) * np.array(domain.paper)
    image = image * rng.normal(1.0, 0.05, 3)
    image = image + rng.normal(0.0, domain.noise, image.shape)
    return np.round(255 * np.clip(image, 0, 1)).astype("uint8")
