"""Models of the Hugging Face hub, by id (`Qwen/Qwen3-0.6B`)."""

import re
from pathlib import Path

from common.errors import UserError

FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]  # Never pickled weights, never code
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None


def fetch(name: str) -> Path:
    """The folder of a model in huggingface_hub's own cache; downloads what is missing, with its progress bars."""
    from huggingface_hub import errors, snapshot_download

    elsewhere = "download it on a machine with network (`hf download " + name + "`) and pass the folder"
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except errors.GatedRepoError:
        problem = "is gated: accept its licence on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub, or is private: check the spelling, or run `hf auth login`"
    except errors.OfflineModeIsEnabled:
        problem = f"is not in the local cache and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
    except errors.LocalEntryNotFoundError:
        problem = f"is not in the local cache and the hub cannot be reached: {elsewhere}"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        problem = f"could not be downloaded ({type(error).__name__}): {elsewhere}"
    raise UserError(f"{name} {problem}")
