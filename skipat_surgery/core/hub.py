"""Pushing a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub


class PushError(RuntimeError):
    """A push that did not end; nothing of it is visible, and it can be repeated."""


PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def push(
    save: Callable[[str], Any],
    repo_id: str,
    *,
    commit_message: str = "Upload a model with Skip-Attention",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    **save_kwargs: Any,
) -> str:
    """Push what `save` writes into a folder, in one commit.

    Args:
        save: Writes the checkpoint into the folder that it is given, model card included.
        repo_id: ``name`` or ``owner/name``; made where it does not exist.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        private: Whether to make the repository private, when it is made.
        token: Of the Hub; the stored one when left out.
        revision: The branch to push to.
        create_pr: Whether to open a pull request instead.
        tags: Further tags of the model card.
        save_kwargs: For `save`, such as ``max_shard_size``.

    Returns:
        The address of the commit.

    Raises:
        PushError: The push did not end; nothing of it is visible, and it can be repeated.
    """
    api = huggingface_hub.HfApi(token=token, library_name="skipat-surgery")
    with TemporaryDirectory() as folder:
        save(folder, **save_kwargs)
        if tags:
            _add_tags(folder, tags)
        done = "nothing was created"
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = f"the repository {repo_id} exists, but nothing was committed to it"
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:
            raise PushError(f"pushing to {repo_id} failed: {done}. Push again to repeat it. {error}") from error
    return str(commit)


def _add_tags(folder: str, tags: list[str]) -> None:
    card = huggingface_hub.ModelCard.load(f"{folder}/README.md")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(f"{folder}/README.md")
