"""Checkpoints loaded by transformers alone, as a program without upcycle would: a script that imports nothing of it."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(out: str, *folders: str) -> None:
    """Write the logits of each folder's model for the tokens 1 to 64 into `out`, an .npz file; refuse a bad loading."""
    logits = []
    for folder in folders:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                sys.exit(f"{folder}: {len(info[kind])} {kind.replace('_', ' ')}, such as {min(map(str, info[kind]))}")
        with torch.no_grad():
            logits.append(model.eval()(input_ids=torch.arange(1, 65).reshape(2, 32)).logits.numpy())
    np.savez(out, *logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
