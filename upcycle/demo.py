"""The demo: a tiny seed and its specialists, trained from real text, mixed into one BAM model, trained and measured.

The three phases of arXiv:2408.08274 at the smallest size that shows them.
"""

import hashlib
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from upcycle.comparison import evaluate_models
from upcycle.data import parse_shares
from upcycle.errors import OutputError, UpcycleError, did_you_mean
from upcycle.evaluation_inputs import EvaluationOptions
from upcycle.merge import merge
from upcycle.numeric import Array
from upcycle.plan import plan_merge
from upcycle.recipe import Recipe
from upcycle.recipe_checks import count_experts
from upcycle.recipe_file import load_recipe
from upcycle.report import write_report
from upcycle.seeds import read_seeds
from upcycle.staging import staging
from upcycle.train import train as train_checkpoint
from upcycle.training_settings import TrainingOptions

FAMILIES: Final = ("llama", "cohere2")
SEED: Final = "seed"
SPECIALISTS: Final = ("code", "math", "prose")
DOMAINS: Final = ("docs", *SPECIALISTS)  # "docs" has no specialist: there the seed is the expert
END_OF_TEXT: Final = "<|endoftext|>"
KEY_FILE: Final = "demo-key.txt"
WORKERS: Final = 2
WARM_UP: Final = 10  # steps
EVALUATION_WINDOWS: Final = 20  # of each domain, while the mixture trains
REPORTED: Final = 20  # steps of the mixture's training from one message to the next

Text = Mapping[str, Sequence[str]]  # documents by domain
Tokens = Mapping[str, Array]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of the trainings; the defaults take some minutes on two cores.

    A step takes `batch` windows of `context` tokens. Learning rates are peaks: half of the seed's for specialists, and
    `own_share` of a specialist's text is its own, the rest the general mix, both as in arXiv:2408.08274.
    """

    vocab_size: int = 2048
    context: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    batch: int = 8
    seed_steps: int = 180
    specialist_steps: int = 80
    seed_learning_rate: float = 6e-3
    specialist_learning_rate: float = 3e-3
    mixture_steps: int = 80
    own_share: float = 0.9
    random_seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        evaluation: of the mixture as trained and as merged, the seeds and their plain average; see `evaluate_models`.
        report: the page about it.
        mixture: the folder of the trained mixture.
        prompt: the start of a held-out code document.
        sample: how the mixture goes on, greedily.
        seconds: the whole run.
    """

    evaluation: Mapping[str, Any]
    report: Path
    mixture: Path
    prompt: str
    sample: str
    seconds: float


@dataclass(frozen=True)
class Training:
    """One training, as a worker process receives it: `base` is the folder to go on from, None to start afresh."""

    out: Path
    key: str
    family: str
    tokenizer: Path
    base: Path | None
    mix: Mapping[str, float]
    tokens: Tokens
    steps: int
    learning_rate: float
    settings: Settings


def run_demo(
    family: str,
    data: Path,
    work: Path,
    *,
    recipe: str = "bam-kv-shared",
    settings: Settings | None = None,
    progress: Progress | None = None,
    pool: Executor | None = None,
) -> DemoResult:
    """Train what is not there yet, merge `seed code math prose`, train the mixture, and measure them all.

    Args:
        family: one of `FAMILIES`: "llama" has a sequential block, "cohere2" a parallel one.
        data: the folder of `<domain>.train.jsonl` and `<domain>.heldout.jsonl`, one `{"text": …}` a line.
        work: where `<family>/<model>` is written, and found again by the next run of the same settings and text.
        recipe: of the mixture.
        settings: sizes and lengths.
        progress: called with a message whenever something begins or is done.
        pool: where the trainings run; by default in processes of their own.

    Raises:
        UpcycleError: an unknown family, text or a recipe that cannot be served, a folder that cannot be written.
    """
    began = time.monotonic()
    settings, report = settings or Settings(), progress or (lambda _: None)
    if family not in FAMILIES:
        raise UpcycleError(f"the demo has no family '{family}'{did_you_mean(family, FAMILIES)}")
    mix = load_recipe(recipe)
    count_experts(mix, 1 + len(SPECIALISTS), None)  # refuses a recipe of another number before minutes of training
    train_text, heldout_text = read_text(data, "train"), read_text(data, "heldout")
    folder, key = work / family, training_key(family, settings, train_text)
    tokenizer = make_tokenizer(folder / "tokenizer", key, train_text, settings)
    heldout = {domain: str(data / f"{domain}.heldout.jsonl") for domain in heldout_text}
    with nullcontext(pool) if pool else _workers() as running:
        for stage in trainings(folder, key, family, tokenizer, train_text, settings):
            train_missing(running, stage, report)
    seeds = [folder / name for name in (SEED, *SPECIALISTS)]
    merged, average = (_merge(recipe, seeds, folder, report) for recipe in (mix, load_recipe("average")))
    mixture = _train_mixture(merged, folder, tokenizer, train_text, heldout, settings, report)
    models = [str(path) for path in (mixture, merged, *seeds, average)]
    evaluation = _evaluate(models, heldout, report)
    page = write_report([mixture], folder / "report.html", evaluation, overwrite=True).out
    prompt, sample = _sample(mixture, encode(tokenizer, heldout_text["code"][:1])[:32])
    return DemoResult(evaluation, page, mixture, prompt, sample, time.monotonic() - began)


def read_text(data: Path, split: str, domains: Sequence[str] = DOMAINS) -> dict[str, list[str]]:
    """The documents of a split, "train" or "heldout", by domain.

    Raises:
        UpcycleError: a file that is missing or damaged.
    """
    text = {}
    for domain in domains:
        file = data / f"{domain}.{split}.jsonl"
        try:
            with file.open(encoding="utf-8") as lines:
                text[domain] = [str(json.loads(line)["text"]) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UpcycleError(
                f'demo text {file}: expected lines of {{"text": …}}, but {error!r}; see --data'
            ) from error
    return text


def training_key(family: str, settings: Settings, text: Text) -> str:
    """SHA-256 of everything a training depends on: the same key, the same models."""
    content = json.dumps([family, asdict(settings), dict(text)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def is_finished(folder: Path, key: str) -> bool:
    """Whether `folder` was written whole for this key (the file comes with the folder's renaming, not before)."""
    file = folder / KEY_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == key


@contextmanager
def finished(folder: Path, key: str) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder`, marked with `key`, only when the block ends well.

    Raises:
        OutputError: `folder` holds something that the demo did not write, or another run is at it.
    """
    if folder.exists() and not (folder / KEY_FILE).is_file():
        raise OutputError(
            f"{folder} exists and was not made by the demo, so it is never overwritten; choose another --work"
        )
    with staging(folder) as partial:
        yield partial
        (partial / KEY_FILE).write_text(key, encoding="utf-8")


def make_tokenizer(folder: Path, key: str, text: Text, settings: Settings) -> Any:
    """A byte-level BPE tokenizer trained on `text`, from `folder` where it is finished."""
    if not is_finished(folder, key):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=settings.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document for documents in text.values() for document in documents), trainer)
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        with finished(folder, key) as partial:
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer,
                model_max_length=settings.context,
                clean_up_tokenization_spaces=False,
                **special,
            ).save_pretrained(partial)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: Any, documents: Sequence[str]) -> Array:
    """One stream of tokens, each document after an end-of-text token; uint16 `[tokens]`."""
    stream: list[int] = []
    for document in documents:
        stream += [tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(document).ids]
    return np.array(stream, np.uint16)


def windows(stream: Array, context: int) -> Array:
    """A stream cut into windows that do not overlap, the rest left off; `[windows, context]`."""
    return stream[: len(stream) // context * context].reshape(-1, context)


def trainings(
    folder: Path, key: str, family: str, tokenizer: Any, text: Text, settings: Settings, *, general: bool = False
) -> Iterator[list[Training]]:
    """The trainings in two stages, each of which can run side by side: the seed, then a specialist a domain.

    With `general` the second stage also holds a control, the seed trained on as long on every domain.
    """
    tokens = {domain: encode(tokenizer, documents) for domain, documents in text.items()}
    equal = dict.fromkeys(text, 1 / len(text))
    seed, same = folder / SEED, (key, family, folder / "tokenizer")
    yield [Training(seed, *same, None, equal, tokens, settings.seed_steps, settings.seed_learning_rate, settings)]
    steps, rate = settings.specialist_steps, settings.specialist_learning_rate
    specialists = []
    for name in (*list(text)[1:], *(["general"] if general else [])):
        own = settings.own_share if name in text else 0.0
        mix = {domain: share * (1 - own) + (own if domain == name else 0) for domain, share in equal.items()}
        specialists.append(Training(folder / name, *same, seed, mix, tokens, steps, rate, settings))
    yield specialists


@contextmanager
def _workers() -> Iterator[Executor]:
    # Processes rather than threads: at this size a second thread within one training slows it down.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, context, initializer=prepare_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """Make a worker process of the trainings: one thread, no progress bars, an end without a traceback."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: end without a traceback
    logging.disable_progress_bar()  # transformers' own bars, one for each model that is read or written


def train_missing(pool: Executor, trainings: Sequence[Training], report: Progress) -> None:
    """Run the trainings whose models are not there yet, side by side."""
    missing = [training for training in trainings if not is_finished(training.out, training.key)]
    for training in trainings:
        doing = f"training, {training.steps} steps" if training in missing else "found, nothing to train"
        report(f"{training.out.name}: {doing}")
    futures = {pool.submit(train, training): training.out.name for training in missing}
    for future in as_completed(futures):
        report(f"{futures[future]}: trained in {future.result():.0f} s")


def train(training: Training) -> float:
    """Run one training and write its checkpoint in bf16; returns the seconds it took.

    The loss is plain next-token NLL; Muon takes the layers' matrices, AdamW the embedding and the norms.
    """
    began = time.monotonic()
    settings = training.settings
    torch.manual_seed(settings.random_seed)
    random = np.random.default_rng(settings.random_seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(training.tokenizer)
    model = _load(training.base) if training.base else _new_model(training.family, len(tokenizer), settings)
    model.train()
    optimizers = _optimizers(model, training.learning_rate)
    for step in range(training.steps):
        batch = _random_batch(training, random)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * _schedule(step, training.steps)
            optimizer.step()
            optimizer.zero_grad()
    with finished(training.out, training.key) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return time.monotonic() - began


def _new_model(family: str, vocab_size: int, settings: Settings) -> Any:
    # The window must be shorter than the context, or sliding attention would never slide.
    own = {"sliding_window": settings.context // 4, "logit_scale": 1.0} if family == "cohere2" else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **own,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _optimizers(model: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    parameters = dict(model.named_parameters())
    matrices = [weight for name, weight in parameters.items() if weight.dim() == 2 and ".layers." in name]
    others = [weight for name, weight in parameters.items() if weight.dim() != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine down to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / WARM_UP) * cosine


def _random_batch(training: Training, random: np.random.Generator) -> torch.Tensor:
    """Windows of domains drawn by the training's mix, at random places; int64 `[batch, context]`."""
    context = training.settings.context
    domains = random.choice(list(training.mix), training.settings.batch, p=list(training.mix.values()))
    rows = []
    for domain in domains:
        stream = training.tokens[domain]
        start = random.integers(len(stream) - context + 1)
        rows.append(stream[start : start + context])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _load(folder: Path) -> Any:
    """A model in fp32, by its own code where it brings some: the demo wrote that code itself."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)


def _merge(recipe: Recipe, seeds: Sequence[Path], folder: Path, report: Progress) -> Path:
    plan = plan_merge(recipe, read_seeds([str(seed) for seed in seeds]))
    out = folder / f"{recipe.name}-{len(seeds)}x"
    result = merge(plan, out, overwrite=True)
    report(f"{out.name}: merged in {result.seconds:.1f} s")
    return out


def _train_mixture(
    merged: Path,
    folder: Path,
    tokenizer: Any,
    text: Text,
    heldout: Mapping[str, str],
    settings: Settings,
    report: Progress,
) -> Path:
    """The third phase: every domain in equal shares, as `upcycle train` does it by default."""
    data = {}
    for domain, documents in text.items():
        file = folder / "tokens" / f"{domain}.npy"
        file.parent.mkdir(exist_ok=True)
        np.save(file, encode(tokenizer, documents))
        data[domain] = str(file)
    options = TrainingOptions(
        model=merged,
        data=data,
        out=folder / f"{merged.name}-trained",
        steps=settings.mixture_steps,
        shares=parse_shares([], data),
        heldout=heldout,
        eval_windows=EVALUATION_WINDOWS,
        sequence_length=settings.context,
        batch_size=settings.batch,
        random_seed=settings.random_seed,
        overwrite=True,
    )

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] % REPORTED == 0:
            report(f"{merged.name}: step {event['step']} of {settings.mixture_steps}, loss {event['nll']:.3f}")

    result = train_checkpoint(options, watch)
    report(f"{merged.name}: trained in {result.seconds:.0f} s")
    return result.out


def _evaluate(models: Sequence[str], heldout: Mapping[str, str], report: Progress) -> dict[str, Any]:
    said: list[str] = []

    def progress(model: str, *_: Any) -> None:
        if model not in said:
            said.append(model)
            report(f"{Path(model).name}: measuring held-out loss")

    return evaluate_models(EvaluationOptions(models, heldout), progress)


def _sample(mixture: Path, prompt: Array, new_tokens: int = 24) -> tuple[str, str]:
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(mixture), _load(mixture)
    tokens = torch.from_numpy(prompt.astype(np.int64))[None]
    output = model.generate(tokens, max_new_tokens=new_tokens, do_sample=False)[0, tokens.shape[1] :]
    return tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(output, skip_special_tokens=True)
