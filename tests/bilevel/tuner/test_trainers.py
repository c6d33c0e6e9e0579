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


@pytest.mark.parametrize(
    ("libraries", "title", "use"),
    [
        (["lightning"], "Lightning", LIGHTNING),
        (["transformers", "accelerate"], "Hugging Face", HUGGING_FACE),
    ],
)
def test_the_recipe_for_a_trainer_runs(libraries, title, use, tmp_path):
    """In a process of its own, since these libraries change settings of the process."""
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RECIPES[title] + use],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
