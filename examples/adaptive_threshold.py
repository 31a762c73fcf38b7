"""A threshold that follows the norms: ZClip, saved with the checkpoint and continued from it."""

import io

import torch

from gradclip_ext import clip_grad_norm_
from gradclip_ext.thresholds import ZClip

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

rule = ZClip(max_norm=50.0, warmup_steps=10)
for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    before = clip_grad_norm_(model.parameters(), rule)
    optimizer.step()
    if epoch == 50:  # as if training ended here, and went on in another process
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "rule": rule.state_dict()}, file)
        file.seek(0)
        checkpoint = torch.load(file)
        model.load_state_dict(checkpoint["model"])
        rule = ZClip(max_norm=50.0, warmup_steps=10)
        rule.load_state_dict(checkpoint["rule"])
    if epoch % 10 == 0:
        norms = f"norm {before.item():8.3f}  mean {rule.mean.item():8.3f}"
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  {norms}")
