"""Chat templates of the seeds: whether they differ, and which one goes into the result."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.checkpoint import MAX_JSON, TOKENIZER_CONFIG, read_json
from upcycle.errors import CheckpointError, SeedError, did_you_mean
from upcycle.seeds import CHAT_TEMPLATES, Seed

JINJA: Final = "chat_template.jinja"
KEY: Final = "chat_template"  # in tokenizer_config.json and chat_template.json
FILES: Final = tuple(file for file in CHAT_TEMPLATES if file != TOKENIZER_CONFIG)
OPTION: Final = "--chat-template"


def template_note(seeds: Sequence[Seed], chosen: str | None) -> str | None:
    """Whose chat template the result has, where there is more than one to choose from and all seeds are here."""
    if not all(seed.here for seed in seeds) or chosen not in (None, *(seed.name for seed in seeds)):
        return None
    templates = [_template(seed) for seed in seeds]
    different = [one for one in templates if one is not None and one != templates[0]]
    if not different:
        return None
    taken = next((template for seed, template in zip(seeds, templates, strict=True) if seed.name == chosen), None)
    template = templates[0] if chosen is None else taken
    others = [
        f"'{seed.name}'"
        for seed, one in zip(seeds, templates, strict=True)
        if one is not None and one != template and seed.name != chosen
    ]
    name = chosen or seeds[0].name
    listed = f"; others are those of {', '.join(others)} ({OPTION} NAME)" if others else ""
    what = f"takes that of seed '{name}'" if template is not None else f"has none, as seed '{name}' has none"
    return f"the seeds' chat templates differ: the result {what}{listed}"


def take_template(
    seeds: Sequence[Seed], name: str | None, copied: Mapping[str, Path], tokenizer_config: Mapping[str, Any] | None
) -> tuple[dict[str, Path], Mapping[str, Any] | None]:
    """The files and the tokenizer_config.json of a result with the template of seed `name`, standing where it has it.

    Args:
        name: None for the first seed's.
        copied, tokenizer_config: those of the result with the first seed's template.

    Raises:
        SeedError: there is no such seed, or it has no chat template.
    """
    if name is None:
        return dict(copied), tokenizer_config
    names = [seed.name for seed in seeds]
    if name not in names:
        raise SeedError(f"{OPTION} {name}: there is no seed of that name{did_you_mean(name, names)}")
    seed = seeds[names.index(name)]
    if _template(seed) is None:
        raise SeedError(
            f"{OPTION} {name}: {seed.where} has no chat template, neither {JINJA} nor '{KEY}' in its "
            f"{TOKENIZER_CONFIG}; name another seed, or leave the option out"
        )
    if seed is seeds[0]:
        return dict(copied), tokenizer_config
    files = {file: path for file, path in copied.items() if file not in FILES}
    files |= {file: seed.get(file) for file in FILES if seed.holds(file)}
    before = tokenizer_config
    if before is None:
        before = read_json(copied[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in copied else {}
    after = {key: value for key, value in before.items() if key != KEY}
    inside = _inside(seed, TOKENIZER_CONFIG)
    after |= {} if inside is None else {KEY: inside}
    return files, tokenizer_config if after == before else after


def _template(seed: Seed) -> Any:
    """A seed's chat template, or several by name; None if it has none."""
    if seed.holds(JINJA):
        try:
            return _small(seed, JINJA).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SeedError(f"{seed.where}: {JINJA} cannot be read: {error}") from error
    inside = _inside(seed, TOKENIZER_CONFIG)
    return _inside(seed, "chat_template.json") if inside is None else inside


def _inside(seed: Seed, file: str) -> Any:
    if not seed.holds(file):
        return None
    try:
        return read_json(_small(seed, file)).get(KEY)
    except CheckpointError as error:
        raise SeedError(f"{seed.where}: {error}") from error


def _small(seed: Seed, file: str) -> Path:
    """Where a file lies, if it is of a size that one may have."""
    path = seed.get(file)
    size = path.stat().st_size
    if size > MAX_JSON:
        raise SeedError(f"{seed.where}: {file} has {size:,} bytes, expected at most {MAX_JSON:,}")
    return path
