"""Upload of an export to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id


def check_hub(repository: str | None) -> None:
    """Refuse a name that no repository can have."""
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: got {repository!r}: {error}") from error


def push(folder: Path, repository: str) -> None:
    """Upload a folder; it stays where it is whatever happens."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export")
