"""A folder for `paper_table.py`: text, a seed trained on all of it, specialists and a control, in both kinds of block.

    python benchmarks/make_seeds.py OUT [--text FOLDER] [--specialists code math prose]

FOLDER holds `DOMAIN.train.jsonl` and `DOMAIN.heldout.jsonl` (by default the repository's own small text); the domain
`docs` has no specialist, there the seed is the expert. OUT gets `tokens/`, `heldout/`, dense checkpoints `seed`, one a
specialist and `general` (the seed trained on as long as a specialist, on every domain), and the same with parallel
blocks (Cohere2) under `parallel/`; with `--hard-rate 1e-2` also specialists under `hard/` that were trained at that
rate, so that they forgot much of the rest. About half an hour on two cores; what is there is not made again.
"""

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from upcycle import demo

SETTINGS = demo.Settings(
    vocab_size=4096, hidden_size=256, intermediate_size=688, seed_steps=700, specialist_steps=150, batch=8
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "tests" / "data" / "text")
    parser.add_argument("--specialists", nargs="+", default=list(demo.SPECIALISTS))
    parser.add_argument("--seed-steps", type=int, default=SETTINGS.seed_steps)
    parser.add_argument("--specialist-steps", type=int, default=SETTINGS.specialist_steps)
    parser.add_argument("--hard-rate", type=float)
    options = parser.parse_args()
    settings = replace(SETTINGS, seed_steps=options.seed_steps, specialist_steps=options.specialist_steps)
    domains = ("docs", *options.specialists)
    text = {split: demo.read_text(options.text, split, domains) for split in ("train", "heldout")}
    sets = [("llama", options.out, settings), ("cohere2", options.out / "parallel", settings)]
    if options.hard_rate:
        hard = replace(settings, specialist_learning_rate=options.hard_rate)
        sets.append(("llama", options.out / "hard", hard))
    for family, folder, settings in sets:
        key = demo.training_key(family, settings, text["train"])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = demo.make_tokenizer(folder / "tokenizer", key, text["train"], settings)
        if folder == options.out:
            write_tokens(options.out, tokenizer, text, settings.context)
        with ProcessPoolExecutor(demo.WORKERS, get_context("spawn"), initializer=demo.prepare_worker) as pool:
            for stage in demo.trainings(folder, key, family, tokenizer, text["train"], settings, general=True):
                demo.train_missing(pool, stage, lambda message: print(message, file=sys.stderr, flush=True))


def write_tokens(out: Path, tokenizer: object, text: Mapping[str, demo.Text], context: int) -> None:
    for split, folder in (("train", "tokens"), ("heldout", "heldout")):
        (out / folder).mkdir(exist_ok=True)
        for domain, documents in text[split].items():
            stream = demo.encode(tokenizer, documents)
            array = stream if split == "train" else demo.windows(stream, context)
            np.save(out / folder / f"{domain}.{split}.npy", array)


if __name__ == "__main__":
    main()
