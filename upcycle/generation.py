"""Text from a checkpoint, for a quick look."""

from pathlib import Path
from typing import Any

from upcycle.checkpoint import CONFIG, read_json
from upcycle.errors import CheckpointError
from upcycle.mixture import is_mixture, read_mixture
from upcycle.seeds import VOCABULARIES


def continue_text(folder: Path, text: str, max_new_tokens: int) -> str:
    """`text` and its greedy continuation by the model in `folder`; the checkpoint's own code is not run.

    Raises:
        CheckpointError: no checkpoint or no tokenizer there, or one that this transformers cannot load.
    """
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False}
    if is_mixture(folder, read_json(folder / CONFIG)):
        read_mixture(folder)  # transformers would fill a missing tensor with noise and go on
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"{folder} holds no tokenizer file ({', '.join(VOCABULARIES)}), so no text can be read")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from upcycle.inspect import inspect_checkpoint
    from upcycle.weights import quiet_transformers

    if is_mixture(folder, read_json(folder / CONFIG)) and not inspect_checkpoint(folder).grouped:
        options["experts_implementation"] = "eager"
    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        inputs = tokenizer(text, return_tensors="pt").to(device)
        if not inputs["input_ids"].numel():
            raise CheckpointError("the text has no tokens; give at least one word to continue")
        ids = model.to(device).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))
    except Exception as error:  # transformers raises whatever it meets in a damaged file
        raise CheckpointError(f"{folder}: no text can be generated: {error}") from error
