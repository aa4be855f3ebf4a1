"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from udddm.errors import ConfigError, StoreError
from udddm.runs import hub

UPLOADED = ("hub", "safetensors", "diffusers")
"""The formats that are models on the Hub."""


def check(repository: str) -> None:
    """Raise ConfigError unless `repository` can be the name user/name of a model on the Hub, and huggingface_hub is
    installed."""
    library = hub.library("--repo")
    try:
        library.utils.validate_repo_id(repository)
    except ValueError as error:
        raise ConfigError(f"--repo {repository}: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise ConfigError(f"--repo {repository}: write user/name")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder as a model, which is created if it does not exist. Returns its address for `load_model`.

    The token is that of `hf auth login` or of the environment (HF_TOKEN). Raises ConfigError and StoreError.
    """
    check(repository)
    library = hub.library("--repo")
    try:
        library.create_repo(repository, exist_ok=True)
        library.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload by udddm export")
    except Exception as error:  # of huggingface_hub and of the HTTP library that it uses
        first = (str(error).strip().splitlines() or [""])[0]
        raise StoreError(
            f"cannot upload to {repository} ({type(error).__name__}: {first}). The folder {folder} is complete: log in "
            f"with `hf auth login`, then run `hf upload {repository} {folder}`"
        ) from error
    return f"{hub.SCHEME}{repository}"
