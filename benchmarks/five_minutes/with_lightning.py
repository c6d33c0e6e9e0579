import lightning
import optuna
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

SEED, EPOCHS, TRIALS = 0, 60, 20
torch.manual_seed(SEED)


class Net(lightning.LightningModule):
    def __init__(self, dropout=0.2, smoothing=0.1, decay=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.hidden = nn.Linear(64, 256)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(256, 10)

    def forward(self, x):
        return self.out(self.drop(F.relu(self.hidden(x))))

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=self.hparams.smoothing)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        decay = self.hparams.decay
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=decay)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)]


images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, valid, test = random_split(data, [400, 400, 997])
train = DataLoader(train, batch_size=50, shuffle=True)
valid = DataLoader(valid, batch_size=400)
test = DataLoader(test, batch_size=997)


def objective(trial):
    dropout = trial.suggest_float("dropout", 0.0, 0.9)
    smoothing = trial.suggest_float("label_smoothing", 0.0, 0.5)
    decay = trial.suggest_float("weight_decay", 1e-5, 1.0, log=True)
    model = Net(dropout, smoothing, decay)
    trainer = lightning.Trainer(max_epochs=EPOCHS, enable_progress_bar=False, logger=False)
    trainer.fit(model, train)
    (losses,) = trainer.validate(model, valid, verbose=False)
    if not kept or losses["loss"] < min(kept):
        kept[losses["loss"]] = model
    return losses["loss"]


kept = {}
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SEED))
study.optimize(objective, n_trials=TRIALS)
model = kept[study.best_value]

model.eval()
for x, y in test:
    print("test loss", F.cross_entropy(model(x), y).item())
