"""Seeds from the Hugging Face Hub."""

import re
from pathlib import Path

from upcycle.checkpoint import CONFIG, COPIED_FILES, INDEX, WEIGHTS
from upcycle.errors import SeedError


def download_seed(name: str, source: str) -> tuple[Path, str]:
    """Download `repo` or `repo@revision` into the Hub's cache; return its folder and the commit it resolves to.

    Raises:
        SeedError: neither a folder nor a repository, or the Hub cannot be reached.
    """
    repo, _, revision = source.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.startswith("."):
        raise SeedError(f"seed '{name}': there is no folder {source}, and that is no name of a Hub repository either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The names that transformers gives, so that neither other layouts of the same weights nor subfolders come along.
    patterns = [CONFIG, WEIGHTS, "model-*-of-*.safetensors", INDEX, "README.md", *COPIED_FILES]
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        raise SeedError(
            f"seed '{name}': the Hub repository {repo} is gated; accept its licence on its page and log in "
            "(hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise SeedError(
            f"seed '{name}': there is neither a folder {source} nor a Hub repository of that name "
            "(or it is private, and you must log in)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SeedError(
            f"seed '{name}': there is no folder {source}, and the Hub cannot be asked for a repository of that name"
        ) from error
    except Exception as error:  # of the client, the network or the answer
        raise SeedError(f"seed '{name}': {source} is no folder, and cannot be had from the Hub: {error}") from error
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        raise SeedError(
            f"seed '{name}': the Hub repository {repo} holds neither {WEIGHTS} nor {INDEX}; weights kept as pickle "
            "(pytorch_model.bin) must be converted first: load them with transformers and save_pretrained them"
        )
    return folder, folder.name
