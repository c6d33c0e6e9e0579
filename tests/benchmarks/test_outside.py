"""Tests of others that need neither data nor a peer, and of their table."""

import pytest
import torch

from benchmarks.outside import __main__ as command
from benchmarks.outside import by_hand, higher_settings, hypertorch_logistic, simulated, threefry
from benchmarks.outside import quadratic_terms as terms
from benchmarks.outside import torchopt_ridge as ridge
from benchmarks.outside.rows import Missing, Options, Row, compared, sampled

PAGE = "before\n<!-- made by: python -m benchmarks.outside -->\n<!-- end -->\nafter\n"


@pytest.mark.parametrize("neumann", [False, True])
def test_torchopts_ridge_hypergradients_equal_the_closed_form(neumann):
    def ours(*arguments):
        return ridge.ours(*arguments, neumann=neumann)

    exact, mine = ridge.path(ridge.closed_form, torch.float64), ridge.path(ours, torch.float64)
    torch.testing.assert_close(mine, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", higher_settings.CASES)
def test_gradients_of_optimizer_settings_equal_finite_differences(case):
    ours, exact = higher_settings.ours(case), higher_settings.finite_differences(case)
    assert (ours - exact).norm() < higher_settings.FINITE * exact.norm()


def test_hypertorchs_notebook_prints_our_losses():
    losses = hypertorch_logistic.inner_losses()
    valid = hypertorch_logistic.validation_losses(11)
    for t, printed in hypertorch_logistic.INNER_LOSSES.items():
        assert losses[t].item() == pytest.approx(printed, rel=1e-6)
    for t in (0, 10):
        printed = hypertorch_logistic.VALIDATION_LOSSES[t]
        assert valid[t].item() == pytest.approx(printed, rel=1e-5)


def test_threefry_gives_the_known_answer():
    """The vector of the Random123 distribution: key 0x13198a2e03707344, counter π."""
    key, high, low = (
        threefry.np.array([word], dtype="uint32") for word in (0, 0x243F6A88, 0x85A308D3)
    )
    key = threefry.np.array([0x13198A2E, 0x03707344], dtype="uint32")
    x, y = threefry.threefry(key, high, low)
    assert (hex(x[0]), hex(y[0])) == ("0xc4923a9c", "0x483df7a0")


def test_the_simulated_problem_has_the_published_constants():
    L = [terms.means(part) for part in terms.both()]
    start = torch.full((terms.SIZE,), terms.START, dtype=torch.float64)
    best = terms.minimum(*L)
    assert terms.value(start, *L).item() == pytest.approx(99.16222, rel=1e-5)
    assert terms.value(best, *L).item() == pytest.approx(-0.1211764, rel=1e-4)


def test_soba_follows_the_algorithm_of_the_benchmark():
    data = terms.both()
    ours = simulated.our_soba(data, 1, 40, own_rate=False)
    torch.testing.assert_close(ours, by_hand.their_soba(data, 1, 40), rtol=1e-10, atol=1e-12)


def test_a_row_states_whether_two_values_agree():
    assert compared("", 1.0, 1.001, 1e-2).agrees
    assert compared("", 1.0, 1.1, 1e-2).agrees is False
    assert compared("", 1.0, float("nan"), 1e-2).agrees is False
    assert sampled("", [1.0, 2.0], [1.4, 1.6], 0.1).cells("t")[-1] == "yes"
    assert sampled("", "3 ± 1", [1.4, 1.6], 0.1, mean=3.0).cells("t")[-1] == "**no**"
    assert sampled("", [1.0], [2.0], None).agrees is None


def test_a_run_replaces_its_own_lines(tmp_path, monkeypatch, capsys):
    page, count = tmp_path / "outside.md", iter((1.0, 2.0, 3.0))
    page.write_text(PAGE)

    class Fake:
        @staticmethod
        def run(options):
            return [Row("quantity", ours=f"{next(count)}")]

    monkeypatch.setattr(command, "import_module", lambda name: Fake)
    for name in ("higher", "TorchOpt", "higher"):
        assert command.main([name, "--page", str(page)]) == 0
    lines = [line for line in page.read_text().splitlines() if "quantity |" in line][1:]
    assert [(line.split(" | ")[0], "3.0" in line) for line in lines] == [
        ("| TorchOpt", False),
        ("| higher", True),
    ]
    assert page.read_text().startswith("before")
    assert page.read_text().endswith("after\n")
    assert command.main(["nothing"]) == 2
    assert "TEST=nothing is unknown" in capsys.readouterr().err


def test_a_test_that_cannot_run_states_the_reason(monkeypatch, capsys):
    with pytest.raises(Missing, match="DATA=PATH"):
        Options().root()
    assert command.main(["cleaning", "--quick"]) == 0
    assert "not run: give the folder with MNIST/raw" in capsys.readouterr().out

    class Broken:
        @staticmethod
        def run(options):
            raise ValueError("broken")

    monkeypatch.setattr(command, "import_module", lambda name: Broken)
    assert command.main(["cleaning", "--quick"]) == 1
    assert "cleaning: ValueError: broken" in capsys.readouterr().err
