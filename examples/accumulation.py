"""Gradient accumulation: clip the sum, once, after the last backward."""

import torch

from gradclip_ext import clip_grad_norm_

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for epoch in range(100):
    optimizer.zero_grad()
    total = 0.0
    for part, target in zip(x.chunk(4), y.chunk(4)):
        loss = torch.nn.functional.mse_loss(model(part), target) / 4
        loss.backward()
        total += loss.item()
    before = clip_grad_norm_(model.parameters(), max_norm=5.0)
    optimizer.step()
    if epoch % 10 == 0:
        print(f"epoch {epoch:3d}  loss {total:8.3f}  norm {before.item():8.3f}")
