"""A training that survives bad steps: a limit that follows the norms, and no step where a norm is a spike."""

import torch

from gradclip_ext import clip_grad_norm_, skip_step_
from gradclip_ext.thresholds import SpikeDetector, ZClip

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

rule, detector = ZClip(max_norm=50.0), SpikeDetector(window=32)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    (loss * torch.nan if epoch in (30, 60) else loss).backward()  # two bad steps
    norm = clip_grad_norm_(model.parameters(), rule)
    skip_step_(optimizer, detector(norm))  # decided on the device: the host does not wait
    optimizer.step()
    if epoch % 10 == 0:
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  norm {norm.item():8.3f}")
