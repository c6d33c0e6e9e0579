import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel
from bilevel import BilevelError, Classifier, Interval, Positive, Space
from bilevel.solvers import delta_stn

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3
SPACE = Space(
    label_smoothing=Interval(low=0.0, high=0.5, init=0.1),
    class_weights=Positive(init=[1.0, 2.0, 3.0], shape=(3,)),
    decay=Positive(init=0.1, optimizer="weight_decay"),
)


def classifier(space=SPACE, **options):
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    return Classifier(module, space, (X, Y), (X, Y), batch_size=10, **options)


def test_the_training_loss_reads_the_hyperparameters_and_the_outer_loss_does_not():
    problem = classifier()
    params, _ = problem.init(torch.Generator())
    hypers = problem.space.constrain(problem.space.init())
    logits = torch.func.functional_call(problem.module.eval(), params, (X,))
    ours = problem.inner_objective(hypers, params, logits, (X, Y))
    weights = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(ours, F.cross_entropy(logits, Y, weights, label_smoothing=0.1))
    plain = F.cross_entropy(logits, Y)
    torch.testing.assert_close(problem.outer_objective(hypers, params, logits, (X, Y)), plain)
    found = problem.metrics(hypers, params, logits, (X, Y))
    torch.testing.assert_close(found["loss"].mean(), plain)
    assert found["accuracy"].mean() == (logits.argmax(1) == Y).float().mean()


def test_self_tuning_solvers_tune_everything_at_once():
    report = bilevel.check_problem(classifier(dropout="*"), {"Δ": delta_stn()})
    assert report.ok, report
    assert report.tuned_by == ["Δ"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("label_smothing", r"space.label_smothing is read by nothing.*mean `label_smoothing`"),
        ("dropout", r"space.dropout is read by nothing in a Classifier without dropout={'dropout'"),
    ],
)
def test_a_hyperparameter_that_nothing_reads_is_refused(name, hint):
    with pytest.raises(BilevelError, match=hint):
        classifier(Space(**{name: Interval(low=0.0, high=0.5, init=0.1)}))
