import torch
from sklearn.datasets import load_digits
from torch import nn

import sae_lab as sl


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(1, d, 2, 2), nn.Parameter(torch.randn(1, 1, d))
        self.pos, self.block, self.head = nn.Parameter(torch.randn(1, 17, d)), Block(d), nn.Linear(d, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos)[:, 0])


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
module = ViT()
optimizer = torch.optim.Adam(module.parameters(), 3e-3)
for _ in range(150):
    batch = torch.randint(0, 1500, (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(images[batch]), labels[batch]).backward()
    optimizer.step()
net = sl.Net(module)
store = sl.harvest(net, "block", images[:600], tokens=10_200)
sae = sl.train(sl.TopK(16, 48, k=4), store, sl.TrainConfig(steps=200, batch_size=256)).coder.eval()
index = sl.index_features(sae, net, store).draw(lambda item: images[item])
