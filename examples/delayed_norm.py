"""Optimizer steps inside backward, where no joint norm is known yet: scale by that of the step before."""

import torch

from gradclip_ext import clip_grads_with_norm_, get_total_norm

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
norms = {}
previous = torch.tensor(torch.inf)  # no norm is known yet: the first step is scaled to nothing


def step(param):
    norms[param] = get_total_norm([param.grad])
    clip_grads_with_norm_([param], 5.0, previous)
    optimizers[param].step()
    optimizers[param].zero_grad()


for param in model.parameters():
    param.register_post_accumulate_grad_hook(step)
for epoch in range(100):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    previous = get_total_norm(list(norms.values()))
    if epoch % 10 == 0:
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  norm {previous.item():8.3f}")
