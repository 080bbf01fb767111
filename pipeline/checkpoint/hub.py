"""Upload an exported model to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from pipeline.checkpoint.export_record import ExportRecord
from pipeline.common.errors import UserError


def push_to_hub(directory: Path, repo_id: str, private: bool | None, record: ExportRecord) -> str:
    """Upload an exported model to the Hugging Face Hub, and create its repository if there is none.

    Args:
        directory: The export.
        repo_id: Hub model ID.
        private: Whether a new repository is private; None: the default of the account.
        record: Origin of the export, for the commit message.

    Returns:
        URL of the repository.

    Raises:
        UserError: The Hub cannot be reached or refuses the upload.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, commit_message=f"Step {record.step}")
    except Exception as error:  # the HTTP library behind the Hub client differs between its versions
        reason = " ".join(str(error).split()) or type(error).__name__  # the cause may be on a later line
        raise UserError(f"{repo_id}: cannot push to the Hub: {reason}; the export is kept in {directory}") from None
    return str(url)
