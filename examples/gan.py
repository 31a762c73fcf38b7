"""Two optimizers: each network is clipped by its own norm, right before its own step."""

import torch

from gradclip_ext import clip_grad_norm_

torch.manual_seed(0)
generator = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
critic = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
loss_of = torch.nn.functional.binary_cross_entropy_with_logits

for epoch in range(100):
    real = torch.randn(64, 2) * 0.5 + torch.tensor([2.0, -1.0])
    fake = generator(torch.randn(64, 4))

    critic_optimizer.zero_grad()  # drops what the generator's step left in the critic
    loss = loss_of(critic(real), torch.ones(64, 1)) + loss_of(critic(fake.detach()), torch.zeros(64, 1))
    loss.backward()
    critic_norm = clip_grad_norm_(critic.parameters(), max_norm=1.0)
    critic_optimizer.step()

    generator_optimizer.zero_grad()
    loss_of(critic(fake), torch.ones(64, 1)).backward()
    generator_norm = clip_grad_norm_(generator.parameters(), max_norm=0.5)
    generator_optimizer.step()
    if epoch % 10 == 0:
        norms = f"{critic_norm.item():.3f} and {generator_norm.item():.3f}"
        print(f"epoch {epoch:3d}  critic's loss {loss.item():8.3f}  norms {norms}")
