"""The script for a machine with a GPU, on the CPU: its parts, its page, its refusals."""

import pytest
import torch

from benchmarks import gpu, images
from benchmarks.hand_written import HandWritten
from benchmarks.measure import multiplications

CPU = torch.device("cpu")
TINY = images.Setting(
    batch=4, width=0.05, norm=None, precision="fp32", channels_last=False, capture=False
)


@pytest.mark.parametrize("network", ["mlp", "simple_cnn"])
def test_the_loop_by_hand_does_the_work_of_a_plain_step(network):
    by_hand = HandWritten(images.problem_of(network, TINY), CPU)
    plain = images.training_step(images.prepared(network, "plain", TINY, CPU))
    assert multiplications(by_hand) == multiplications(plain)
    first = float(by_hand.loss)
    for _ in range(20):
        by_hand()
    assert float(by_hand.loss) < 0.9 * first


def test_the_page_has_a_row_for_each_step_and_says_what_was_stopped():
    found = images.measured("mlp", TINY, 0.0, CPU, dict.fromkeys(images.VARIANTS, 2**20))
    parts = [
        gpu.Outcome("tests", "pytest", 1.0, 0, "", {"passed": 3, "skipped": 1}),
        gpu.Outcome("images", "b", 2.0, 0, "", {**TINY._asdict(), "networks": {"mlp": found}}),
        gpu.Outcome("late", "c", 30.0, None, "killed here"),
    ]
    report = {
        "machine": "a card",
        "torch": "2.6",
        "cuda": "12",
        "python": "3.12",
        "commit": "abc",
        "date": "2026-01-01",
        "command": "python -m benchmarks.gpu",
        "parts": [vars(part) for part in parts],
    }
    page = gpu.markdown(report)
    assert "3 passed, 1 skipped in 1 s." in page
    assert "Stopped after 30 s" in page
    assert "killed here" in page
    rows = [line.split("|")[2].strip() for line in page.splitlines() if line.startswith("| mlp")]
    assert rows[:5] == [*images.VARIANTS, "by hand, eager"]
    assert "augmentation" in rows[5]


def test_a_part_that_takes_too_long_is_stopped_and_a_failed_one_keeps_its_last_lines(tmp_path):
    late = gpu.child("late", ["timeit", "-n1", "import time; time.sleep(60)"], 1.0, tmp_path)
    assert late.status is None
    failed = gpu.child("failed", ["timeit", "raise ValueError(7)"], 60.0, tmp_path, parse=float)
    assert failed.status == 1
    assert failed.result is None
    assert "ValueError: 7" in failed.output


def test_without_a_gpu_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--device=cuda needs a GPU" in capsys.readouterr().err
