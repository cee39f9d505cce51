"""Digests of the files beside an encoder's weights: what they decide, not where they lie.

Two checkpoints of equal weights give other results under another norm epsilon, rotary base, pixel
normalisation or tokenizer. Digests are taken of what was loaded, not of the files as they are
written, so that a copy saved again is the same encoder. What a file says about itself (names,
versions, the precision that it was saved in) is left out.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ABOUT_THE_FILE = {"architectures", "transformers_version", "torch_dtype", "dtype"}
"""Besides everything that starts with an underscore, such as `_name_or_path`."""


def settings_digest(settings: Mapping[str, Any]) -> str:
    """32 hexadecimal digits over nested settings, whatever their order."""
    text = json.dumps(_deciding(settings), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """32 hexadecimal digits over what turns a text into the token ids of a transformers tokenizer."""
    content: dict[str, Any] = {
        "special_tokens": tokenizer.special_tokens_map,
        "padding": tokenizer.pad_token_id,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are what the last call set.
        content["backend"] = backend | {"truncation": None, "padding": None}
    else:
        content["class"] = type(tokenizer).__name__
        switches = tokenizer.init_kwargs.items()
        content["switches"] = {name: value for name, value in switches if isinstance(value, bool)}
        content["files"] = _vocabulary_files(tokenizer)
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    """Name → digest: merges and scores, which `get_vocab` leaves out, are in them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        return {
            path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            for path in Path(folder).iterdir()
        }


def _deciding(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _deciding(each)
            for name, each in value.items()
            if not str(name).startswith("_") and name not in _ABOUT_THE_FILE
        }
    return [_deciding(each) for each in value] if isinstance(value, list | tuple) else value
