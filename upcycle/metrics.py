"""What a training measured, as plain numbers for `metrics.jsonl` and for trackers."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from upcycle.losses import RouterLosses


def router_metrics(routers: RouterLosses) -> dict[str, Any]:
    """The routers' losses and what they did, by layer, as numbers of six digits."""
    values = {
        "load_balance": routers.load_balance,
        "z": routers.z,
        "attention_z": routers.attention_z,
        "load": routers.load,
        "gates": routers.gates,
        "entropy": routers.entropy,
        "attention_entropy": routers.attention_entropy,
    }
    return {name: np.vectorize(_rounded)(value.numpy()).tolist() for name, value in values.items() if value.numel()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def finite(value: Any) -> Any:
    """Plain data with null for what is no finite number, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tracked(values: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker can plot: numbers, sums over layers, losses by domain."""
    scalars = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    for key in ("load_balance", "z", "attention_z"):
        if key in values:
            scalars[key] = float(np.sum(values[key]))
    for domain, measured in values.get("heldout", {}).items():
        if measured["loss"] is not None:
            scalars[f"heldout/{domain}"] = measured["loss"]
    return scalars
