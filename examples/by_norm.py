"""Clip by norm: all gradients are scaled together, so that their direction stays what it was."""

import torch

from gradclip_ext import clip_grad_norm_, get_total_norm

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    before = clip_grad_norm_(model.parameters(), max_norm=5.0)
    optimizer.step()
    if epoch % 10 == 0:
        after = get_total_norm([p.grad for p in model.parameters()])
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  norm {before.item():8.3f} -> {after.item():.3f}")
