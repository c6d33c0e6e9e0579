import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

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
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
for epoch in range(EPOCHS):
    model.train()
    for x, y in train:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    schedule.step()

model.eval()
for x, y in test:
    print("test loss", F.cross_entropy(model(x), y).item())
