"""`upcycle demo --tiny`: the demo's whole path at toy size, on text made in code, and checks of what must hold then.

For a user's own CI: it says within a minute whether upcycle works with the versions installed there.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from upcycle import smoke_loader
from upcycle.demo import DOMAINS, KEY_FILE, SEED, SPECIALISTS, DemoResult, Progress, Settings, run_demo
from upcycle.errors import OutputError, UpcycleError
from upcycle.merge import merge
from upcycle.numeric import Array
from upcycle.plan import plan_merge
from upcycle.recipe_file import load_recipe
from upcycle.seeds import read_seeds
from upcycle.smoke_text import COUNTS, documents
from upcycle.verify import verify
from upcycle.weights import load_model, quiet_transformers

TOLERANCE: Final = 1e-5  # of a logit in fp32
TINY: Final = Settings(
    vocab_size=384,
    context=64,
    hidden_size=64,
    intermediate_size=128,
    layers=2,
    batch=8,
    seed_steps=40,
    specialist_steps=20,
    mixture_steps=20,
)


@dataclass(frozen=True)
class Found:
    """What the demo left behind, as the checks look at it."""

    result: DemoResult
    recipe: str
    seeds: Mapping[str, Path]
    merged: Path

    @property
    def trained(self) -> Path:
        """The mixture after its training."""
        return self.result.mixture

    def entry(self, model: Path) -> Any:
        """What was measured of a model."""
        return self.result.evaluation["models"][str(model)]


def run_smoke(
    family: str,
    work: Path,
    *,
    recipe: str = "bam-kv-shared",
    settings: Settings = TINY,
    tell: Progress,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo on its own text in `work`/tiny, always from the start, and check what must hold.

    Args:
        family, recipe, settings, progress: as in `run_demo`.
        work: where the folder `tiny` is written.
        tell: called with a sentence for each check that was passed.

    Raises:
        UpcycleError: a check that was not passed, or what `run_demo` refuses.
    """
    work = work / "tiny"
    try:
        for mark in work.glob(f"{family}/*/{KEY_FILE}"):  # found models would spare the training that is to be tested
            shutil.rmtree(mark.parent)
        write_text(work / "text")
    except OSError as error:
        raise OutputError(f"{work} cannot be written: {error.strerror}; choose another --work") from error
    quiet_transformers()
    with ThreadPoolExecutor(1) as pool:  # to start a process takes longer than such a training
        result = run_demo(family, work / "text", work, recipe=recipe, settings=settings, progress=progress, pool=pool)
    folder = result.mixture.parent
    seeds = {name: folder / name for name in (SEED, *SPECIALISTS)}
    found = Found(result, recipe, seeds, folder / result.mixture.name.removesuffix("-trained"))
    for check in CHECKS:
        tell(check(found))
    return result


def write_text(folder: Path) -> None:
    """Write the documents of every domain as the demo reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for split in COUNTS:
            lines = [json.dumps({"text": text}) + "\n" for text in documents(domain, split)]
            (folder / f"{domain}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def check_specialists(found: Found) -> str:
    """Each specialist knows its own domain better than the seed and the other specialists do."""
    gains = []
    for name in SPECIALISTS:
        losses = {other: found.entry(path)["domains"][name]["loss"] for other, path in found.seeds.items()}
        best = min(losses, key=lambda other: float(losses[other]))
        if best != name:
            raise UpcycleError(
                f"training failed: on {name} the specialist's held-out loss is {losses[name]:.3f}, that of '{best}' "
                f"{losses[best]:.3f}; expected the specialist's to be the lowest"
            )
        gains.append(losses[SEED] - losses[name])
    return f"specialists: each is the best in its domain, at least {min(gains):.2f} nats per token below the seed"


def check_files(found: Found) -> str:
    """Checksums, names, shapes and numbers of both mixtures; the merged one is what its seeds give."""
    counts = []
    for folder, seeds in ((found.merged, [str(path) for path in found.seeds.values()]), (found.trained, [])):
        verified = verify(folder, seeds)
        if verified.problems or verified.unsummed:
            raise UpcycleError(f"verification failed: {[*verified.problems, f'{folder} has no checksums'][0]}")
        counts.append(verified.remade)
    return f"merge: all {counts[0]} tensors are what the seeds give, to the bit; checksums of both mixtures hold"


def check_loading(found: Found) -> str:
    """transformers alone and upcycle's own classes load the same model, without a tensor too few or too many."""
    folders = (found.merged, found.trained)
    worst = 0.0
    for folder, alone in zip(folders, _logits_alone(folders), strict=True):
        worst = max(worst, _same(_logits(folder), alone, f"two loads of {folder} differ"))
    return f"loading: by transformers alone, no tensor missing or unexpected; logits as by upcycle, to {worst:.0e}"


def check_identity(found: Found) -> str:
    """A mixture of copies of the seed computes what the seed computes."""
    recipe = load_recipe(found.recipe)
    # Gates that do not sum to 1 scale the FFN, or the attention, and nothing would be equal.
    overrides = ["router.ffn.normalize=true"] if recipe.ffn_experts else []
    if recipe.attention_experts and recipe.attention_router.routing == "top-k":
        overrides.append("router.attention.normalize=true")
    if recipe.experts.extra:  # of several that are alike none is found to be the ancestor
        overrides.append(f"experts.extra_from=seed:{SEED}")
    seed = found.seeds[SEED]
    copies = read_seeds([f"{name}={seed}" for name in found.seeds])
    plan = plan_merge(load_recipe(found.recipe, overrides), copies, allow_unrelated=True)
    out = merge(plan, found.merged.with_name(f"{recipe.name}-copies"), overwrite=True).out
    worst = _same(_logits(out), _logits(seed), f"{len(copies)} copies of the seed do not give its logits")
    return f"exactness: {len(copies)} copies of the seed by {recipe.name} give its own logits, to {worst:.0e}"


def check_training(found: Found) -> str:
    """The training of the mixture lowers its held-out loss."""
    before, after = (found.entry(folder)["mean_loss"] for folder in (found.merged, found.trained))
    if not after < before:
        raise UpcycleError(f"training failed: the mixture's held-out loss went from {before:.3f} to {after:.3f}")
    return f"training: the mixture's held-out loss fell from {before:.3f} to {after:.3f}"


def check_report(found: Found) -> str:
    """The page is there and names every model."""
    page = found.result.report
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for model in found.result.evaluation["models"]:
        if Path(model).name not in text:
            raise UpcycleError(f"the report failed: {page} {'does not show ' + model if text else 'was not written'}")
    return f"report: {page}, {len(text) // 1000} kB"


CHECKS: Final[tuple[Callable[[Found], str], ...]] = (
    check_specialists,
    check_files,
    check_loading,
    check_identity,
    check_training,
    check_report,
)


def _logits(folder: Path) -> Array:
    """As `smoke_loader` computes them, by the classes of this process."""
    model = load_model(folder, torch.float32).eval()
    with torch.no_grad():
        logits: Array = model(input_ids=torch.arange(1, 65).reshape(2, 32)).logits.numpy()
    return logits


def _logits_alone(folders: tuple[Path, ...]) -> list[Array]:
    """The same in a new process that has not imported upcycle, by the code that the checkpoint brings."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        # -P: the script's own folder holds names of the standard library.
        command = [sys.executable, "-P", str(smoke_loader.__file__), str(out), *map(str, folders)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = ran.stderr.strip().splitlines()
            raise UpcycleError(f"loading by transformers alone failed: {said[-1] if said else ran.returncode}")
        with np.load(out) as saved:
            return list(saved.values())


def _same(one: Array, other: Array, what: str) -> float:
    """The largest difference, which must be small."""
    worst = float(np.abs(one - other).max())
    if not worst <= TOLERANCE:
        raise UpcycleError(
            f"exactness failed: {what}: by up to {worst:.2g} in a logit, expected {TOLERANCE:.0e} or less"
        )
    return worst
