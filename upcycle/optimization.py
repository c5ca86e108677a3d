"""What is trained, and by which optimizer: the choice of parameters, LoRA, AdamW in its three forms."""

import re
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from upcycle.errors import TrainingError
from upcycle.modeling.modeling_bam import GatedOutput
from upcycle.offload import OffloadedAdamW

BETAS: Final = (0.9, 0.95)
# Names of parameters that routers and experts have in BAM and in transformers' own mixtures.
_ROUTER: Final = re.compile(r"\.(router|gate)\.(layer\.)?(weight|bias)$")
# Shared experts, and the gates that some have, are experts: no other FFN stands in their place.
_EXPERT: Final = re.compile(r"\.experts\.|\.shared\.\d+\.|\.shared_(experts?|mlp|expert_gate)\.")


def parse_trained(spec: str) -> tuple[str, int]:
    """`all`, `experts`, `routers` or `routers-then-all:STEPS`: what is trained, and for how many steps routers alone.

    Raises:
        TrainingError: anything else.
    """
    kind, _, steps = spec.partition(":")
    if kind == "routers-then-all" and steps.isdecimal() and int(steps) > 0:
        return "all", int(steps)
    if spec in ("all", "experts", "routers"):
        return spec, 0
    raise TrainingError(f"--train {spec}: expected all, experts, routers or routers-then-all:STEPS")


def is_router(name: str) -> bool:
    """Whether a parameter is a router's, or its bias: BAM's `router`, `gate` in transformers' own mixtures."""
    return _ROUTER.search(name) is not None


def choose_trained(model: nn.Module, trained: str) -> None:
    """Let gradients reach what is trained, and nothing else.

    Args:
        trained: "all", "experts" (FFN experts, shared ones too, the attention where it is a mixture, and routers; not
            what layers without experts have in their place) or "routers".

    Raises:
        TrainingError: a dense model has neither experts nor routers.
    """
    if trained == "all":
        return
    count = 0
    attentions = tuple(
        name.rpartition(".")[0] + "." for name, one in model.named_modules() if isinstance(one, GatedOutput)
    )
    for name, parameter in model.named_parameters():
        chosen = is_router(name)
        if trained == "experts":
            chosen = chosen or bool(_EXPERT.search(name)) or name.startswith(attentions)
        parameter.requires_grad_(chosen)
        count += chosen
    if not count:
        raise TrainingError(f"--train {trained}: the model is dense, it has none; train all of it")


def add_lora(model: Any, rank: int) -> Any:
    """LoRA (arXiv:2106.09685) of a rank on attention and experts, scaled by 2; routers are trained whole.

    Raises:
        TrainingError: `peft` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainingError("--lora needs the library peft: pip install peft") from error
    linear, stacked = [], []
    for name, module in model.named_modules():
        routed = is_router(f".{name}.weight")
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and not routed:
            linear.append(name)
        # Stacked experts are parameters [N, rows, columns] of one module.
        stacked += [f"{name}.{key}" for key, value in module.named_parameters(recurse=False) if value.dim() == 3]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, target_parameters=stacked or None)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if is_router(name):
            parameter.requires_grad_(True)
    return adapted


def make_optimizer(model: nn.Module, kind: str, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over what is trained; matrices and stacks of matrices decay, norms and biases do not.

    Args:
        kind: "adamw", "adamw-8bit" (moments in 8 bits) or "adamw-offload" (moments and the update on the host).

    Raises:
        TrainingError: 8-bit moments without `torchao` or without a GPU.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)
    if kind == "adamw-offload":
        return OffloadedAdamW(groups, lr=learning_rate, betas=BETAS)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(f"--optimizer {kind} needs the library torchao: pip install torchao") from error
    if not torch.cuda.is_available():
        raise TrainingError(f"--optimizer {kind} needs a GPU; without one take adamw")
    return AdamW8bit(groups, lr=learning_rate, betas=BETAS)  # type: ignore[no-any-return]


def forget_others(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Drop the gradients of all but the routers: the optimizer then leaves those parameters as they are."""
    for name, parameter in named:
        if not is_router(name):
            parameter.grad = None
