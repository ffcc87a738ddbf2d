"""Adapters on the Hugging Face hub: their files come into the client's cache, and go up in one commit.

Whatever reads an adapter asks `local_directory` first, which is the one place that downloads. Every error of the client
becomes an OSError of one sentence in `hub_errors`.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ept.files.adapter_dir import CONFIG_NAME, WEIGHTS_NAME
from ept.files.model_card import CARD_NAME, described_card, is_public_name, is_repo_name
from ept.files.run_record import RUN_NAME
from ept.version import __version__

__all__ = ["copy_beside", "hub_errors", "local_directory", "upload"]

logger = logging.getLogger("ept")

# What belongs to an adapter: its own files, the record of its run, and its tokenizer's files.
ADAPTER_FILES = (
    CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin", RUN_NAME, "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip


def copy_beside(directory: str | os.PathLike, output: str | os.PathLike) -> None:
    """Copies what an adapter's directory has beside its config and weights: the record of its run, and its tokenizer."""
    for file in _files_of(Path(directory)):
        if file.name not in (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"):
            target = Path(output) / file.relative_to(directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _files_of(directory: Path) -> list[Path]:
    """An adapter's files in its directory, in order."""
    return sorted({file for pattern in ADAPTER_FILES for file in directory.glob(pattern) if file.is_file()})


def local_directory(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Returns where the files of an adapter lie; those of a hub id ("user/name") are downloaded into the cache.

    Args:
        path: a directory or file, which wins over a repository of the same name, or else a hub id.
        revision: branch, tag or commit of the repository; None: its main branch.
        token: of the hub; None: HF_TOKEN or the one that `hf auth login` saved; False: none.
        cache_dir: where downloads are kept; None: the hub client's cache.

    Raises:
        FileNotFoundError: there is no such directory, repository or revision, or the repository holds no adapter.
        PermissionError: the repository is gated, or the token is refused.
        ConnectionError: the hub cannot be reached, and the cache has no copy.
        ValueError: `revision` is given with a directory.
    """
    place = Path(path)
    if place.exists():
        if revision is not None:
            raise ValueError(f"`revision={revision}` is of a repository on the hub, but {place} is here on the disk")
        return place
    name = os.fspath(path)
    if not _is_hub_id(name):
        raise FileNotFoundError(
            f"{name} holds no {CONFIG_NAME}: there is no such directory; give one that save_pretrained wrote, or a hub id "
            "(user/name)"
        )
    with hub_errors(f"{name} is no directory here, and cannot be read from the hub", revision):
        directory = Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                allow_patterns=list(ADAPTER_FILES),
                library_name="ept",
                library_version=__version__,
            )
        )
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{name} on the hub holds no adapter: it has no {CONFIG_NAME}")
    return directory


def upload(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Uploads an adapter's files from a directory in one commit, with a model card; returns the commit.

    The card is the directory's README.md, or else the repository's, or else a fresh one; each gets the adapter's metadata.

    Args:
        directory: where the adapter is saved.
        repo_id: "user/name"; the repository is made if there is none.
        private: whether a repository that is made is private; None: as its owner has set it.
        revision: branch to commit to, made if there is none; None: the main branch.
        create_pr: opens a pull request in place of a commit to the branch.
        tags: further tags of the model card.

    Raises:
        OSError: the hub cannot be reached or refuses, in one sentence.
    """
    directory = Path(directory)
    settings = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    _warn_of_backbone(repo_id, settings.get("base_model_name_or_path"))
    with hub_errors(f"{repo_id} cannot be written on the hub", revision):
        api = HfApi(library_name="ept", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        text = (directory / CARD_NAME).read_text(encoding="utf-8") if (directory / CARD_NAME).is_file() else None
        card = described_card(text or _card_on_hub(repo_id, revision, token), settings, repo_id, tags)
        files = _files_of(directory)
        operations = [
            CommitOperationAdd(path_in_repo=file.relative_to(directory).as_posix(), path_or_fileobj=str(file))
            for file in files
        ]
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=str(card).encode()))
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload an EPT adapter",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


@contextlib.contextmanager
def hub_errors(failure: str, revision: str | None = None) -> Iterator[None]:
    """Raises, in place of the hub client's errors in the block, an OSError of one sentence that begins with `failure`."""
    log_in = "log in with hf auth login, or give a token that may"
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(f"{failure}: it is gated; ask for access on its page, and {log_in}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{failure}: there is no such repository, or it is private; {log_in}") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{failure}: it has no branch, tag or commit {revision}") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{failure}: HF_HUB_OFFLINE is set") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise ConnectionError(f"{failure}: {reason}, and the cache has no copy") from error
    except HfHubHTTPError as error:
        status, words = error.response.status_code, " ".join((error.server_message or str(error)).split())
        if status in (401, 403):
            raise PermissionError(f"{failure}: {words}; {log_in}") from error
        raise OSError(f"{failure}: {status}, {words}") from error
    except (RuntimeError, ValueError) as error:  # as of a large file, of the card, or of a name
        raise OSError(f"{failure}: {' '.join(str(error).split())}") from error
    except HTTPError as error:  # a connection that fails is none of the client's own errors
        raise ConnectionError(f"{failure}: {constants.ENDPOINT} cannot be reached ({error})") from error


@functools.cache  # once, however many checkpoints go up
def _warn_of_backbone(repo_id: str, name: str | None) -> None:
    """Logs that others must say where the backbone is, if the adapter names it by a directory of this machine."""
    if not is_public_name(name):
        named = "does not name its backbone" if not name else f"names its backbone {name}, a directory of this machine"
        logger.warning("%s: the adapter %s: others have to give `name_or_path`", repo_id, named)


def _is_hub_id(name: str) -> bool:
    """Whether a name has a repository's form: a user and a name with one slash between."""
    return name.count("/") == 1 and is_repo_name(name)


def _card_on_hub(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """The model card of a repository; None where it has none."""
    api = HfApi(library_name="ept", library_version=__version__)
    try:
        file = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
    except LocalEntryNotFoundError:  # of the same family, and says that the hub does not answer: the card may be there
        raise
    except EntryNotFoundError:
        return None
    return Path(file).read_text(encoding="utf-8")
