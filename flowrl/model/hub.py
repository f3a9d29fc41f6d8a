"""Where an agent is: a folder, ``pretrained:NAME``, or ``hf:OWNER/NAME`` or ``hf:OWNER/NAME@REVISION``."""

from pathlib import Path

from flowrl.errors import UserError, one_line
from flowrl.model import pretrained
from flowrl.model.checkpoint import AGENT_FILES

PREFIX = "hf:"
LARGEST = 2**30  # bytes of one file; an agent of the default size has 10 MB


def agent_folder(run: str | Path) -> Path:
    """Return the folder that ``run`` names: in the package after ``pretrained:``, downloaded after ``hf:``.

    Only the files of an agent are downloaded, into the Hub's cache, after their sizes were checked; what they
    hold is checked when they are loaded. Where the Hub cannot be reached or ``HF_HUB_OFFLINE`` is set, the
    cache is used.

    Raises:
        UserError: no such agent in the package; no such repository or revision, one without an agent, a
            file that is too large, or no answer and nothing in the cache.
    """
    if str(run).startswith(pretrained.PREFIX):
        return pretrained.pretrained_folder(str(run).removeprefix(pretrained.PREFIX))
    if not str(run).startswith(PREFIX):
        return Path(run)
    # Here, for only agents on the Hub need it.
    import huggingface_hub
    from huggingface_hub import errors

    name = str(run).removeprefix(PREFIX)
    repo, _, revision = name.partition("@")
    try:
        try:
            hub = huggingface_hub.HfApi()
            found = hub.get_paths_info(repo, sorted(AGENT_FILES), revision=revision or None)
            _check_files(str(run), {entry.path: getattr(entry, "size", LARGEST + 1) for entry in found})
            offline = False
        except (UserError, ValueError):
            raise
        except Exception as error:  # whatever its HTTP library raises without a network, or offline mode
            answer = error.response if isinstance(error, errors.HfHubHTTPError) else None
            if answer is not None and answer.status_code < 500:
                raise
            offline = True
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=sorted(AGENT_FILES), local_files_only=offline
        )
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{run}: the repository has no revision '{revision}'") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{run}: no such repository, or a private one: check the name, log in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{run}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{run}: the Hub cannot be reached, and it was not downloaded before") from error
    except UserError:
        raise
    except Exception as error:  # of the Hub, of its HTTP library, of the disk
        raise UserError(f"{run}: could not be downloaded: {one_line(error)}") from error
    return Path(folder)


def _check_files(run: str, sizes: dict[str, int]) -> None:
    for name in sorted(AGENT_FILES):
        if name not in sizes:
            raise UserError(f"{run}: not an agent of flowrl, it has no {name}")
        if sizes[name] > LARGEST:
            raise UserError(f"{run}: {name} has {sizes[name]} bytes, more than {LARGEST}; not downloaded")
