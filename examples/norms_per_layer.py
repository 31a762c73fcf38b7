"""Log the norm of every layer's gradient, and draw them if matplotlib is installed."""

import tempfile
from pathlib import Path

import torch

from gradclip_ext import clip_grads_with_norm_, get_grad_stats

torch.manual_seed(0)
x = torch.randn(256, 8)
y = 10 * x @ torch.randn(8, 1) + torch.randn(256, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

history = []
for epoch in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    stats = get_grad_stats(model)
    clip_grads_with_norm_(model.parameters(), 5.0, stats.total_norm)
    history.append(stats.to_dict())
    optimizer.step()
    if epoch % 10 == 0:
        print(f"epoch {epoch:3d}  loss {loss.item():8.3f}  norm {history[-1]['grad/norm']:8.3f}")

try:
    from matplotlib.figure import Figure
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    axes = (figure := Figure()).subplots()
    for name in stats.names:
        axes.plot([found[f"grad/norm/{name}"] for found in history], label=name)
    axes.set(xlabel="epoch", ylabel="norm of the gradient", yscale="log")
    axes.legend()
    path = Path(tempfile.mkdtemp()) / "norms_per_layer.png"
    figure.savefig(path)
    print(path)
