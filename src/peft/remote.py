"""Files of an adapter: in a local folder, or on the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import EntryNotFoundError

from .errors import near, printable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CODE_KWARGS = ("trust_remote_code", "code_revision")  # of a base model; libraries pass them on to its adapters, too
HUB_KWARGS = (
    *("cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version"),
    *("local_dir", "local_files_only", "proxies", "repo_type", "revision", "token", "use_auth_token", "user_agent"),
)
PUSH_KWARGS = ("commit_description", "commit_message", "create_pr", "private", "revision", "token", "use_auth_token")
# Where other libraries put the parts of a base that they place anew: here it stays where it is.
PLACING_KWARGS = ("device_map", "max_memory", "offload_dir", "offload_folder", "offload_index", "use_safetensors")


def refuse_others(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for keyword arguments that nothing here takes, naming near ones."""
    known = tuple(known)
    others = [k for k in given if k not in known]
    if others:
        hints = "".join(near(k[:80], known) for k in others)
        raise TypeError(f"{what} takes no argument {', '.join(map(repr, others))}.{hints}")


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

    args: dict[str, Any] = {k: v for k, v in remote.items() if k in HUB_KWARGS}
    _use_token(args)
    if args.pop("proxies", None):  # transformers passes None
        raise TypeError("proxies: the hub's client takes a proxy from the environment, as HTTPS_PROXY.")
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


def _use_token(args: dict[str, Any]) -> None:
    """`use_auth_token` by the name that the hub's client has for it now."""
    older = args.pop("use_auth_token", None)
    if older is not None and args.get("token") is None:
        args["token"] = older


def push_folder(write: Callable[[str], object], repo_id: str, **kwargs: Any) -> CommitInfo:
    """Write into a temporary folder and upload it.

    token, private, commit_message, commit_description, revision (a branch, made where there is none), create_pr: as the
    hub's client takes them. Raises TypeError for any other argument, before anything is written.
    """
    refuse_others("push_to_hub()", kwargs, PUSH_KWARGS)
    _use_token(kwargs)
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.get("token"))
    made = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
    repo_id = getattr(made, "repo_id", None) or repo_id  # with the user's name
    revision, create_pr = kwargs.get("revision"), bool(kwargs.get("create_pr"))
    asked: dict[str, Any] = {
        "commit_description": kwargs.get("commit_description"),
        "revision": revision,
        "create_pr": create_pr or None,
    }
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        if revision is not None and not create_pr and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            commit_message=kwargs.get("commit_message") or "Upload adapter",
            **{k: v for k, v in asked.items() if v is not None},
        )
