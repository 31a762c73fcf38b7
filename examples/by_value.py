"""Clip by value: every element of the gradients is clamped on its own."""

import torch

from gradclip_ext import clip_grad_value_

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    before = max(p.grad.abs().max().item() for p in model.parameters())
    clip_grad_value_(model.parameters(), clip_value=1.0)
    optimizer.step()
    if epoch % 10 == 0:
        after = max(p.grad.abs().max().item() for p in model.parameters())
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  largest element {before:8.3f} -> {after:.3f}")
