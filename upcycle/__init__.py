"""Turn dense language models that share one ancestor into one mixture of experts."""

from upcycle.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Teach transformers' Auto classes the `bam` model type, so that BAM checkpoints load without remote code."""
    from upcycle.modeling import register as register_bam

    register_bam()
