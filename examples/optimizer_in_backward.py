"""Optimizer steps inside backward, which free each gradient at once: clipping per tensor, by AdaGC."""

import torch

from gradclip_ext import clip_grad_norm_
from gradclip_ext.thresholds import AdaGC

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
rules = {p: AdaGC([p], max_norm=5.0, warmup_steps=10) for p in model.parameters()}
norms = {}


def step(param):
    norms[param] = clip_grad_norm_([param], rules[param], per_tensor=True)
    optimizers[param].step()
    optimizers[param].zero_grad()


for param in model.parameters():
    param.register_post_accumulate_grad_hook(step)
for epoch in range(100):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    if epoch % 10 == 0:
        largest = torch.cat(list(norms.values())).max()
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  largest norm of a tensor {largest.item():8.3f}")
