"""A model's tokenizer, without the model: whoever only counts tokens waits neither for peft nor for torch."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import Tokenizer

from unsink.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)

_STORED = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take `tokenizer.json` as it stands; others make parts of it anew."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder; a missing padding token becomes the end-of-sequence token.

    Raises:
        ModelError: no tokenizer, or one that needs code from its repository.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase  # brings torch: seconds

    LOG.debug("loading the tokenizer in %s", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # transformers raises a dozen kinds here (ValueError, OSError, KeyError, ImportError, tokenizers' bare Exception)
    except Exception as error:
        raise ModelError(
            f"no usable tokenizer in {folder}: {error}",
            "copy the model's tokenizer.json and tokenizer_config.json there",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


@dataclass(frozen=True)
class Encoder:
    """All of a tokenizer that counting takes; called like one of transformers, it gives the same ids.

    Attributes:
        stored: the content of `tokenizer.json`.
        bos_token_id: None without such a token.
        eos_token_id: None without such a token.
    """

    stored: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return the text's token ids as `input_ids`."""
        return {"input_ids": self.stored.encode(text, add_special_tokens=add_special_tokens).ids}


def load_encoder(folder: Path) -> "Encoder | PreTrainedTokenizerBase":
    """What counts the tokens of a model folder, without transformers where its files say all about them.

    Raises:
        ModelError: as `load_tokenizer`.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config["tokenizer_class"] in _STORED and "auto_map" not in config:
            stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
            ids = {name: stored.token_to_id(config[name]) if config.get(name) else None for name in _ENDS}
            return Encoder(stored, ids["bos_token"], ids["eos_token"])
    except Exception:  # noqa: BLE001  whatever is wrong with the files, transformers copes with it or says what it is
        LOG.debug("transformers has to read the tokenizer in %s", folder)
    return load_tokenizer(folder)


_ENDS = ("bos_token", "eos_token")


def plain_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the tokens that are no special ones, in order."""
    special = set(tokenizer.all_special_ids)
    return [i for i in range(len(tokenizer)) if i not in special]


def bos_ids(tokenizer: "Encoder | PreTrainedTokenizerBase") -> list[int]:
    """The one id that starts every sequence: BOS, or EOS for models without BOS.

    Raises:
        ModelError: the tokenizer has neither.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ModelError(
            "the tokenizer has neither a BOS nor an EOS token", "name one in tokenizer_config.json (bos_token)"
        )
    return [first]
