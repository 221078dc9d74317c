"""Ramps, step by step."""

import keras
import numpy as np
import pytest

from keras_renorm.schedules import LinearRamp, ioffe2017, limit


def test_every_step_of_a_ramp():
    ramp = LinearRamp(1.0, 3.0, begin_step=2, end_step=6)
    expected = [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert [ramp(step) for step in range(9)] == expected
    np.testing.assert_array_equal(ramp(np.arange(9)), expected)


def test_a_ramp_may_fall():
    ramp = LinearRamp(5.0, 0.0, 0, 5)
    assert [ramp(step) for step in range(7)] == [5, 4, 3, 2, 1, 0, 0]


def test_a_ramp_of_no_length_is_a_switch():
    ramp = LinearRamp(1.0, np.inf, 3, 3)
    assert [ramp(step) for step in range(5)] == [1, 1, 1, np.inf, np.inf]


def test_flat_ramps_are_their_number():
    assert LinearRamp(2.0, 2.0, 0, 0) == LinearRamp(2, 2, 5, 9) == 2
    assert LinearRamp(2.0, 2.0, 0, 0) != 3.0
    assert LinearRamp(1.0, 2.0, 0, 1) != LinearRamp(1.0, 2.0, 0, 2)
    assert LinearRamp(1.0, 2.0, 0, 1) != 1.0
    assert len({LinearRamp(2.0, 2.0, 0, 0), LinearRamp(2, 2, 1, 3), 2.0}) == 1


def test_the_paper():
    r_max, d_max = ioffe2017()
    for step, r, d in [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (10**9, 3, 5),
    ]:
        assert r_max(step) == pytest.approx(r)
        assert d_max(step) == pytest.approx(d)


@pytest.mark.parametrize(
    ("total", "steps"),
    [
        (130_000, (5_000, 40_000, 5_000, 25_000)),
        (1_300, (50, 400, 50, 250)),
        (13, (0, 4, 0, 2)),
        (1, (0, 0, 0, 0)),
    ],
)
def test_the_paper_scaled_to_a_run(total, steps):
    r_max, d_max = ioffe2017(total)
    assert (
        r_max.begin_step,
        r_max.end_step,
        d_max.begin_step,
        d_max.end_step,
    ) == steps
    assert (r_max(total), d_max(total)) == (3.0, 5.0)


def test_serialization_gives_the_same_ramp():
    ramp = LinearRamp(1.1, 3.3, 10, 20)
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(ramp)
    )
    assert again == ramp
    assert repr(again) == repr(ramp)


def test_a_ramp_cannot_be_changed():
    with pytest.raises(AttributeError):
        LinearRamp(1.0, 2.0, 0, 1).final_value = 3.0


@pytest.mark.parametrize("number", [np.array(2), np.array(2.0), np.float16(2)])
def test_numbers_of_numpy_are_numbers(number):
    ramp = LinearRamp(number, number, np.int64(3), np.array(3))
    assert all(type(each) is float for each in (ramp(0), ramp.final_value))
    assert type(ramp.begin_step) is type(ramp.end_step) is int
    assert ramp == limit("r_max", number) == number
    with pytest.raises(TypeError, match="`r_max` must be a number, a"):
        limit("r_max", np.array([2.0]))
    with pytest.raises(TypeError, match="`r_max` must be a number, a"):
        limit("r_max", np.array(True))
    with pytest.raises(TypeError, match="`total_steps` must be an integer"):
        ioffe2017(np.array(2.0))
