"""Upload of an export to the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id


class UploadError(RuntimeError):
    """The export is complete, its upload failed."""


def check_hub(repository: str | None) -> None:
    """Refuse, before any work, a name that no repository can have, and a machine that is not logged in.

    Raises:
        ValueError: One of these; nothing is asked over the network.
    """
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: got {repository!r}: {error}") from error
    if get_token() is None:
        raise ValueError(f"push_to_hub: got {repository!r}, but this machine is not logged in to the hub; call 'hf auth login' first")


def push(folder: Path, repository: str) -> None:
    """Upload a finished export; the folder stays where it is whatever happens.

    A repository that does not exist yet is created private, so that nothing gets public by accident; one that exists stays as it is, and
    files in it that the export does not have stay too.

    Args:
        folder: What `export` wrote.
        repository: ``name`` or ``owner/name``.

    Raises:
        UploadError: The upload failed; the message says where the export is and how to push it again.
    """
    api = HfApi()
    try:
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=created.repo_id, commit_message=f"Export of {folder.name}")
    except Exception as error:  # of the network, of the account, of the hub: the way out is the same
        again = shlex.join(["hf", "upload", "--private", repository, str(folder), "."])
        raise UploadError(
            f"push_to_hub: the export in {str(folder)!r} is complete and verified, but its upload to {repository!r} failed: {error}; "
            f"push it again with: {again}"
        ) from error
