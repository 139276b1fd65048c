"""Kill it whenever you like and start it again: it goes on as if nothing had happened."""

import torch

import everstep

STEPS = 1000
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

client = everstep.connect(job="example", interval=10)
client.attach(model=model, optimizer=optimizer, scheduler=scheduler)
start = client.restore() or 0
for step in range(start, STEPS):
    x = torch.randn(256, 64)
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    client.snapshot(step + 1)
    print(step + 1, loss.item(), flush=True)
client.close()
