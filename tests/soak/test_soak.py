"""The judge of the hour-long run finds a leak and a slowing step, and ignores noise."""

import pytest

from tests.soak.hour import Sample, judge, while_training

FLAT = [
    Sample(2.0 * i, 800 + i % 5, 30 + i % 3, 2.0 * i + 0.01 * (i % 7), 100 * i)
    for i in range(1, 400)
]


@pytest.mark.parametrize(
    ("change", "flat"),
    [
        (lambda sample: sample, True),
        (
            lambda sample: sample._replace(memory=sample.memory + 0.01 * sample.seconds),
            True,
        ),  # 36 MiB an hour, 8 in this time
        (lambda sample: sample._replace(memory=sample.memory + 0.1 * sample.seconds), False),
        (
            lambda sample: sample._replace(
                memory_of_wandb=sample.memory_of_wandb + 0.1 * sample.seconds
            ),
            False,
        ),
        (
            lambda sample: sample._replace(
                processor=sample.processor * (1 + sample.seconds / 2000)
            ),
            False,
        ),
    ],
)
def test_a_run_is_flat_or_it_is_not(change, flat, capsys):
    assert judge("toy", [change(sample) for sample in FLAT]) == flat
    assert ("NOT FLAT" in capsys.readouterr().out) == (not flat)


def test_what_comes_before_the_first_step_and_after_the_last_is_left_out():
    idle = [Sample(0.1 * i, 10 * i, 0, 50, 0) for i in range(9)]
    drawing = [FLAT[-1]._replace(seconds=FLAT[-1].seconds + i, memory=2000) for i in range(20)]
    assert while_training([*idle, *FLAT, *drawing]) == FLAT[:-1]
