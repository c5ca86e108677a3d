"""AdamW whose moments and update live on the host, so that a GPU holds only weights, gradients and activations."""

from typing import Any

import torch


class OffloadedAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` on host copies of the parameters; a step brings gradients down and weights back.

    Gradients are fetched when the step is taken, after clipping and after several processes averaged them.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, {"lr": options["lr"]})
        self.hosts = {
            parameter: torch.nn.Parameter(parameter.detach().to("cpu", copy=True))
            for group in self.param_groups
            for parameter in group["params"]
        }
        on_host = [{**group, "params": [self.hosts[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = torch.optim.AdamW(on_host, fused=True, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what has a gradient."""
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = outer["lr"]
        for parameter, host in self.hosts.items():
            host.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        self.inner.step()
        for parameter, host in self.hosts.items():
            if host.grad is not None:
                parameter.copy_(host)
                host.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up moments; the parameters, which were loaded before, are the host's from now on."""
        self.inner.load_state_dict(state_dict)
        for parameter, host in self.hosts.items():
            host.copy_(parameter)
