import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
import bilevel.solvers

SEED, EPOCHS = 0, 60
torch.manual_seed(SEED)


class Net(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.hidden = nn.Linear(64, 256)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(256, 10)

    def forward(self, x):
        return self.out(self.drop(F.relu(self.hidden(x))))


images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, valid, test = random_split(data, [400, 400, 997])
train = DataLoader(train, batch_size=50, shuffle=True)
valid = DataLoader(valid, batch_size=400)
test = DataLoader(test, batch_size=997)

model = Net()
dropout = bilevel.Interval(low=0.0, high=0.9, init=0.2)
smoothing = bilevel.Interval(low=0.0, high=0.5, init=0.1)
decay = bilevel.Positive(init=1e-2, optimizer="weight_decay")
space = bilevel.Space(dropout=dropout, label_smoothing=smoothing, weight_decay=decay)
problem = bilevel.Classifier(model, space, train, valid, dropout="*")
optimizer = lambda params: torch.optim.AdamW(params, lr=3e-3)
schedule = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
solver = bilevel.solvers.delta_stn(inner_optimizer=optimizer, inner_scheduler=schedule)
model = bilevel.Runner(epochs=EPOCHS).run(problem, solver).module()

model.eval()
for x, y in test:
    print("test loss", F.cross_entropy(model(x), y).item())
