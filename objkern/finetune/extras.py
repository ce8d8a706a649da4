"""The packages that fine-tuning needs and the core of objkern doesn't."""

from importlib.util import find_spec

FINETUNE_EXTRA = ("transformers", "tokenizers", "safetensors", "matplotlib", "tqdm")


def require_finetune_extra() -> None:
    """Raises an ImportError that says what to install if a package is missing."""
    missing = [package for package in FINETUNE_EXTRA if find_spec(package) is None]
    if missing:
        raise ImportError(f"fine-tuning needs {', '.join(missing)}: pip install {' '.join(missing)}")
