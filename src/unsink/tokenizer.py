"""A model's tokenizer, without the model: whoever only counts tokens does not wait for peft."""

import logging
from pathlib import Path
from typing import cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unsink.errors import ModelError

LOG = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; a missing padding token becomes the end-of-sequence token.

    Raises:
        ModelError: no tokenizer, or one that needs code from its repository.
    """
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


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
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
