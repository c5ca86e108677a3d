"""Models by their names on the Hub, everywhere a folder can be given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from upcycle.seeds import Seed


def fetched(source: str | Path) -> Path:
    """The folder of a model given as one or by its name on the Hub, which is downloaded with a progress bar."""
    from upcycle.hub import model_folder

    return model_folder(source, output.byte_progress)


def fetch_seeds(seeds: "Sequence[Seed]") -> bool:
    """Download what is not here of seeds on the Hub, with a progress bar; whether there was anything."""
    from upcycle.seeds import download, download_bytes

    size = download_bytes(seeds)
    if size:
        with output.byte_progress("download the seeds", size) as progress:
            download(seeds, progress)
    return bool(size)


@contextmanager
def fetched_by_name(sources: Sequence[str]) -> Iterator[dict[str, str]]:
    """A folder for each source, called as the source is: what the cache calls it is a commit's hash."""
    with TemporaryDirectory(prefix="upcycle-") as links:
        found = {}
        for number, source in enumerate(dict.fromkeys(sources)):
            folder = fetched(source)
            found[source] = str(folder)
            if folder != Path(source):
                link = Path(links) / str(number) / source  # by number: one name may begin with another
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(folder.absolute(), target_is_directory=True)
                found[source] = str(link)
        yield found
