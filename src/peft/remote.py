"""Files of an adapter: in a local folder, or on the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import EntryNotFoundError

from .errors import printable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CODE_KWARGS = ("trust_remote_code", "code_revision")  # of a base model; libraries pass them on to its adapters, too
HUB_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "repo_type",
    "revision",
    "token",
    "use_auth_token",
)


def find_file(model_id: str, name: str, subfolder: str | None, remote: Mapping[str, object]) -> str | None:
    """A file of an adapter: in the local folder, or downloaded. A local folder never touches the network."""
    if not isinstance(subfolder, (str, type(None))) or "\0" in f"{model_id}{subfolder}":
        raise ValueError(f"subfolder {subfolder!r} of {model_id!r} is no name of a folder")
    if os.path.isdir(model_id):
        root = os.path.join(model_id, subfolder) if subfolder else model_id
        path = os.path.join(root, name)
        home, here = os.path.realpath(model_id), os.path.realpath(root)
        if os.path.commonpath([home, here]) != home:
            raise ValueError(printable(f"subfolder {subfolder!r} leads out of {model_id}"))
        return path if os.path.isfile(path) else None
    if os.path.isabs(model_id) or model_id.startswith((".", "~")) or model_id.count("/") > 1:
        return None  # a path that does not exist, no repository's name
    from huggingface_hub import hf_hub_download

    args: dict[str, Any] = {
        k: v for k, v in remote.items() if k in HUB_KWARGS and k not in ("proxies", "use_auth_token")
    }
    try:
        return hf_hub_download(model_id, name, subfolder=subfolder, **args)
    except EntryNotFoundError:
        return None
    except Exception as e:
        raise ValueError(
            printable(
                f"Can't find '{name}' at '{model_id}': it is no local folder, and the hub answered: {type(e).__name__}: {e}"
            )
        ) from e


def push_folder(write: Callable[[str], object], repo_id: str, **kwargs: Any) -> CommitInfo:
    """Write into a temporary folder and upload it."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    message = kwargs.pop("commit_message", None) or "Upload adapter"
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return api.upload_folder(repo_id=repo_id, folder_path=Path(folder), commit_message=message)
