"""Clamp inside backward: each gradient is clamped before it is added to ``.grad``."""

import torch

from gradclip_ext import register_clamp_hook

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

handle = register_clamp_hook(model, min=-0.5, max=2.0)
for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if epoch % 10 == 0:
        grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        print(
            f"epoch {epoch:3d}  loss {loss.item():8.3f}  gradients in [{grads.min():.3f}, {grads.max():.3f}]"
        )
handle.remove()
