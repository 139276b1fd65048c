"""Training loops on a device, one for each way to update that capture must not mind."""

import itertools
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn, optim

import everstep

DEVICE = "cuda"
WIDTH = 160
Objects = dict[str, Any]


class Network(nn.Module):
    """Of random depth and widths: leaves of all sizes, one transposed, and a busy buffer."""

    def __init__(self, pick: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [WIDTH, *(pick.randint(3, 700) for _ in range(pick.randint(2, 4))), WIDTH]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, dtype=dtype), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(WIDTH, dtype=dtype))
        self.transposed = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH, dtype=dtype).t() / WIDTH)
        self.wide = nn.Parameter(torch.randn(2 * WIDTH, WIDTH, dtype=dtype) / WIDTH)
        self.frozen = nn.Parameter(torch.randn(300, 301, dtype=dtype), requires_grad=False)
        self.seen: torch.Tensor
        # Written by the very next forward: only a copy made at once can be right.
        self.register_buffer("seen", torch.zeros(64, WIDTH, dtype=dtype))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen.add_(batch[:64].to(self.seen.dtype))
        wide = nn.functional.linear(batch, self.transposed) + nn.functional.linear(batch, self.wide)
        out: torch.Tensor = self.layers(batch) + wide[:, :WIDTH] * wide[:, WIDTH:]
        return out


class Loop:
    """A loop over a random network.

    Attributes:
        objects: What is attached.
        connect_options: For `everstep.connect`.
    """

    dtype = torch.float32

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pick = random.Random(seed)
        torch.manual_seed(seed)
        with torch.device(DEVICE):
            self.network = Network(self.pick, self.dtype)
            self.static = torch.randn(96, WIDTH, dtype=self.dtype)
        self.module: Callable[[torch.Tensor], torch.Tensor] = self.network
        self.optimizers = self.made_optimizers([*self.network.parameters()])
        self.objects: Objects = {"model": self.network}
        for number, optimizer in enumerate(self.optimizers):
            self.objects[f"optimizer{number or ''}"] = optimizer
        self.connect_options: Objects = {}

    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters, lr=1e-3, fused=True)]

    def warm(self) -> None:
        """Take the first steps, which make the optimizer's state."""
        for _ in range(2):
            self.step()

    def ready(self, client: everstep.Client) -> None:
        """Called once, after everything was attached."""

    def gradients(self) -> torch.Tensor:
        self.static.normal_()
        loss: torch.Tensor = (self.module(self.static) - self.static).square().mean()
        loss.backward()
        return loss

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.pick.random() < 0.5)

    def step(self) -> None:
        self.gradients()
        self.update()

    def tensors(self, *, on_host: bool = False) -> dict[str, torch.Tensor]:
        """Copies of all tensors as they are now, by leaf name.

        On the device they are enqueued, and nothing waits for them.
        """
        named = {f"model/{name}": t for name, t in self.network.state_dict().items()}
        names = {id(p): f"model.{name}" for name, p in self.network.named_parameters()}
        for key, thing in self.objects.items():
            if isinstance(thing, optim.Optimizer):
                for parameter, state in thing.state.items():
                    for part, value in state.items():
                        if isinstance(value, torch.Tensor):
                            named[f"{key}/state/{names[id(parameter)]}/{part}"] = value
        if on_host:
            return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


class Foreach(Loop):
    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters, lr=1e-3, foreach=True)]


class ForLoop(Loop):
    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters, lr=1e-3, foreach=False, amsgrad=True)]


class Capturable(Loop):
    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters, lr=1e-3, capturable=True)]


class Momentum(Loop):
    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.SGD(parameters, lr=1e-3, momentum=0.9)]


class TwoOptimizers(Loop):
    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters[::2], lr=1e-3), optim.Adagrad(parameters[1::2], lr=1e-3)]


class Bfloat16(Loop):
    dtype = torch.bfloat16


class Scaled(Loop):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        self.objects["scaler"] = self.scaler

    def step(self) -> None:
        self.static.normal_()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = (self.module(self.static) - self.static).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizers[0])
        self.scaler.update()
        self.optimizers[0].zero_grad()


class Clipped(Loop):
    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.1)
        super().update()


class Accumulated(Loop):
    def step(self) -> None:
        for _ in range(3):
            self.gradients()
        self.update()


class SteppedTwice(Loop):
    """optimizer.step() twice over the same gradients."""

    def update(self) -> None:
        self.optimizers[0].step()
        super().update()


class Compiled(Loop):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.module = torch.compile(self.network)
        self.objects["model"] = self.module


class Graphed(Loop):
    """The whole step is one CUDA graph; the fence sits around its replay."""

    graph: "torch.cuda.CUDAGraph"

    def made_optimizers(self, parameters: list[nn.Parameter]) -> list[optim.Optimizer]:
        return [optim.AdamW(parameters, lr=1e-3, capturable=True)]

    def warm(self) -> None:
        self.gradients()
        self.update()

    def ready(self, client: everstep.Client) -> None:
        assert client.snapshot(1).wait()  # nothing of it disturbs the recording
        self.updating = client.updating
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.optimizers[0].zero_grad()
                self._whole()
        torch.cuda.current_stream().wait_stream(aside)
        self.optimizers[0].zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._whole()

    def _whole(self) -> None:
        (self.module(self.static) - self.static).square().mean().backward()
        self.optimizers[0].step()

    def step(self) -> None:
        self.static.normal_()
        with self.updating():
            self.graph.replay()

    updating: Callable[[], Any] = nullcontext


def with_options(**options: Any) -> Callable[[int], Loop]:
    """The plain loop, captured in another way."""

    def made(seed: int) -> Loop:
        loop = Loop(seed)
        loop.connect_options = options
        return loop

    return made


LOOPS: dict[str, Callable[[int], Loop]] = {
    "fused": Loop,
    "foreach": Foreach,
    "for-loop": ForLoop,
    "capturable": Capturable,
    "momentum": Momentum,
    "two optimizers": TwoOptimizers,
    "bfloat16": Bfloat16,
    "scaled": Scaled,
    "clipped": Clipped,
    "accumulated": Accumulated,
    "stepped twice": SteppedTwice,
    "compiled": Compiled,
    "graphed": Graphed,
    "no scratch": with_options(scratch_bytes=0),
    "little scratch": with_options(scratch_bytes=1 << 20),
    "incremental": with_options(incremental=True),
    "host digests": with_options(digests="host"),
    "one in flight": with_options(captures_in_flight=1),
}
