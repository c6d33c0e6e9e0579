"""Run the recipes of docs/trainers.md with the real libraries, where they are installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "trainers.md").read_text()
RECIPES = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))

LIGHTNING = """
from torch.utils.data import DataLoader, TensorDataset

x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x[:, :1])
train = DataLoader(torch.utils.data.Subset(data, range(40)), batch_size=8)
valid = DataLoader(torch.utils.data.Subset(data, range(40, 48)), batch_size=8)

def fit(epochs, seed, **more):
    torch.manual_seed(seed)
    module = Tuned(valid)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, train, **more)
    return module, trainer

_, trainer = fit(2, 0)
trainer.save_checkpoint("run.ckpt")
resumed, _ = fit(4, 1, ckpt_path="run.ckpt")
straight, _ = fit(4, 0)
assert straight.tuner.solver.inner_count == 20 and straight.tuner.solver.outer_count == 4
assert straight.tuner.hypers["decay"] != 0.01
assert torch.equal(straight.tuner.hypers["decay"], resumed.tuner.hypers["decay"])
for ours, theirs in zip(straight.network.parameters(), resumed.network.parameters()):
    assert torch.equal(ours, theirs)
"""

REPLAY = """
def check_replay(tuned, plain, other):
    mean, spread = torch.tensor(plain).mean(), torch.tensor(plain).std()
    assert spread > 0 and abs(tuned - mean) < 3 * spread, (tuned, plain)
    assert abs(other - mean) > 3 * spread, ("another value, another loss", other, plain)
"""

LIGHTNING_REPLAY = (
    REPLAY
    + """
from torch.utils.data import DataLoader, TensorDataset

x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
data = TensorDataset(x, x[:, :1] + noise)
train = DataLoader(torch.utils.data.Subset(data, range(100)), batch_size=10, shuffle=True)
valid = DataLoader(torch.utils.data.Subset(data, range(100, 200)), batch_size=100)

def loss_of(module, seed):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(seed)
    lightning.Trainer(
        max_epochs=40, accelerator="cpu", enable_checkpointing=False, **quiet).fit(module, train)
    (x, y), = valid
    return float(F.mse_loss(module.network(x), y).detach())

def plain(decay, seed):
    torch.manual_seed(seed)
    return loss_of(Plain(decay), seed)

torch.manual_seed(0)
module = Tuned(valid)
tuned = loss_of(module, 0)
decay = float(module.tuner.hypers["decay"])
check_replay(tuned, [plain(decay, seed) for seed in (1, 2, 3, 4)], plain(10.0, 1))
"""
)

HUGGING_FACE_REPLAY = (
    REPLAY
    + """
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

x = torch.randint(0, 20, (160, 6), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": (row[0] > 9).long()} for row in x]
ids, labels = torch.stack([row["input_ids"] for row in rows[80:]]), (x[80:, 0] > 9).long()

def loss_of(kind, seed, **more):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, attn_implementation="eager"))
    arguments = TrainingArguments(
        "out", max_steps=60, per_device_train_batch_size=8, use_cpu=True, report_to=[], seed=seed,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, weight_decay=0)
    trainer = kind(model, arguments, train_dataset=rows[:80], **more)
    trainer.train()
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(input_ids=ids).logits, labels)), trainer

tuned, trainer = loss_of(TunedTrainer, 0, tune_dataset=rows[80:])

def plain(decay, seed):
    PlainTrainer.decay = decay
    return loss_of(PlainTrainer, seed)[0]

decay = float(trainer.tuner.hypers["decay"])
check_replay(tuned, [plain(decay, seed) for seed in (1, 2, 3, 4)], plain(3000 * decay, 1))
"""
)

HUGGING_FACE = """
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

x = torch.randint(0, 20, (96, 6), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": (row[0] > 9).long()} for row in x]
torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, attn_implementation="eager"))
arguments = TrainingArguments(
    "out", max_steps=12, per_device_train_batch_size=8, use_cpu=True, report_to=[], seed=1,
    logging_steps=4, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, weight_decay=0)
trainer = TunedTrainer(model, arguments, train_dataset=rows[:64], tune_dataset=rows[64:])
before = model.classifier.weight.clone()
trainer.train()
tuner = trainer.tuner
assert (tuner.solver.inner_count, tuner.solver.outer_count) == (12, 2)
assert tuner.hypers["decay"] != 1e-4
assert not torch.equal(before, model.classifier.weight)
rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
assert rates == sorted(rates, reverse=True) and rates[-1] < 2e-3
assert tuner.solver.scheduled()[0].param_groups[0]["lr"] < 2e-3, "the response follows"
"""

ACCELERATE = """
import pytest

assert (tuner.solver.inner_count, tuner.solver.outer_count) == (20, 4)
assert tuner.hypers["decay"] != 0.01
plain = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
plain.load_state_dict(model.state_dict())
assert optimizer.param_groups[0]["lr"] == 0, "the schedule acts"

def attach(model, optimizer):
    space = Space(decay=Positive(init=0.01))
    penalty = lambda hypers, params: hypers["decay"] * squared_norm(params)
    loss = lambda prediction, batch: F.mse_loss(prediction, batch[1])
    return bilevel.attach(
        model, space, loss=loss, penalty=penalty, optimizer=optimizer, solver=delta_stn())

with pytest.raises(bilevel.BilevelError, match=r"wraps another optimizer.*optimizer\\.optimizer"):
    attach(model, optimizer)

from accelerate.state import AcceleratorState
AcceleratorState._reset_state(True)
half = Accelerator(cpu=True, mixed_precision="bf16")
model, optimizer = half.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.0))
network = nn.Sequential(*plain)
both = (model, optimizer.optimizer), (network, torch.optim.SGD(network.parameters(), lr=0.0))
losses = [attach(m, o).step((x, x[:, :1])) for m, o in both]
assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02 * losses[1], "bfloat16"
"""


@pytest.mark.parametrize(
    ("libraries", "title", "use"),
    [
        (["lightning"], "Lightning", LIGHTNING),
        (["lightning"], "Lightning", LIGHTNING_REPLAY),
        (["transformers", "accelerate"], "Hugging Face", HUGGING_FACE),
        (["transformers", "accelerate"], "Hugging Face", HUGGING_FACE_REPLAY),
        (["accelerate"], "accelerate", ACCELERATE),
    ],
    ids=[
        "Lightning",
        "Lightning, a plain run",
        "Hugging Face",
        "Hugging Face, a plain run",
        "accelerate",
    ],
)
def test_the_recipe_for_a_trainer_runs(libraries, title, use, tmp_path):
    """In a process of its own, since these libraries change settings of the process."""
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    script = RECIPES[title] + RECIPES.get(f"{title}, plain", "") + use
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
