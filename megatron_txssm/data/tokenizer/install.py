"""Installs a corpus's tokenizer: finds it, looks up its end-of-document token and copies it beside the shards.

Megatron loads the copy in training, so nodes need no internet access, and the tokenizer cannot change after the tokens
were made.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_txssm.data.tokenizer.sentencepiece import load_tokenizer
from megatron_txssm.errors import UserError
from megatron_txssm.files import file_sha256, write_file_atomically, write_json
from megatron_txssm.recipe.corpus.schema import TokenizerSource
from megatron_txssm.recipe.corpus.tokenizer import TokenizerFacts, read_tokenizer_facts

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_file(folder: Path, facts: TokenizerFacts) -> Path:
    """The file that defines the tokenizer, in a corpus's tokenizer/ folder."""
    return folder / ("tokenizer.model" if facts.type == "SentencePieceTokenizer" else "tokenizer.json")


def check_tokenizer(directory: Path) -> TokenizerFacts:
    """The corpus's tokenizer; UserError if its file is not the one that made the tokens."""
    facts = read_tokenizer_facts(directory)
    path = tokenizer_file(directory / "tokenizer", facts)
    if not path.is_file() or file_sha256(path) != facts.fingerprint:
        raise UserError(
            f"{path} is not the tokenizer that this corpus was made with ({facts.fingerprint}); put it back"
        )
    return facts


def install_tokenizer(source: TokenizerSource, folder: Path) -> TokenizerFacts:
    """Copy a tokenizer into `folder` and return its facts; UserError if it is unsuitable.

    The same source gives the same files. The tokenizer's own code is neither copied nor run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    install = _install_sentencepiece if source.type == "SentencePieceTokenizer" else _install_huggingface
    facts = install(source, folder)
    write_json(folder / "facts.json", vars(facts))
    return facts


def _install_sentencepiece(source: TokenizerSource, folder: Path) -> TokenizerFacts:
    model = load_tokenizer(source.model)
    eod = model.eos_id() if source.eod_token is None else model.PieceToId(source.eod_token)
    if eod < 0 or (source.eod_token is not None and model.IdToPiece(eod) != source.eod_token):
        why = f"its eos id is {eod}" if source.eod_token is None else f"{source.eod_token!r} is not a piece"
        raise UserError(
            f"tokenizer.model={source.model} has no end-of-document token ({why}); "
            "documents could not be separated: train it with one (txssm data train-tokenizer does)"
        )
    content = Path(source.model).read_bytes()
    write_file_atomically(folder / "tokenizer.model", content)
    return TokenizerFacts(
        type=source.type,
        fingerprint=hashlib.sha256(content).hexdigest(),
        vocab_size=model.GetPieceSize(),
        eod=eod,
        eod_token=model.IdToPiece(eod),
    )


def _install_huggingface(source: TokenizerSource, folder: Path) -> TokenizerFacts:
    from tokenizers import Tokenizer

    path, configs = _find_huggingface(source.model)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what tokenizers raises
        raise UserError(f"tokenizer.model={source.model}: {path} is not a tokenizer.json: {error}") from None
    eod_token = source.eod_token or _named_token(configs, "eos_token")
    if eod_token is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise UserError(
            f"tokenizer.model={source.model} does not say which token ends a document (no eos_token in a "
            f"tokenizer_config.json beside it); state tokenizer.eod_token, one of {special or 'its tokens'}"
        )
    eod = tokenizer.token_to_id(eod_token)
    if eod is None:
        raise UserError(f"tokenizer.eod_token={eod_token!r} is not a token of {source.model}; state one of its tokens")
    if path.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(path, folder / "tokenizer.json.partial")
        (folder / "tokenizer.json.partial").replace(folder / "tokenizer.json")
    # Only what transformers needs to load it: a config from a hub may name code to run.
    pad_token = _pad_token(tokenizer, configs, eod_token)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eod_token,
            **({"pad_token": pad_token} if pad_token else {}),
            "clean_up_tokenization_spaces": False,
        },
    )
    return TokenizerFacts(
        type=source.type,
        fingerprint=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        vocab_size=1 + max(tokenizer.get_vocab(with_added_tokens=True).values()),
        eod=eod,
        eod_token=eod_token,
    )


def _find_huggingface(model: str) -> tuple[Path, list[Path]]:
    """(tokenizer.json, the configuration files beside it) of a file, a folder or a name on the hub."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    path = Path(model)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path, [path.with_name(name) for name in names if path.with_name(name).is_file()]
    # A model's name may contain a dot: Qwen/Qwen2.5-7B.
    if path.suffix in (".json", ".model") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise UserError(f"tokenizer.model={model}: no such file (a relative path starts at {Path.cwd()})")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(model, name))
        except EntryNotFoundError as error:
            # Not in the cache, and the hub is unreachable: the file may exist there.
            if name == "tokenizer.json" and isinstance(error, LocalEntryNotFoundError):
                raise
            return None

    try:
        path = fetch("tokenizer.json")
        configs = [config for name in names if path and (config := fetch(name))]
    except Exception as error:  # many kinds, of the hub and the network
        raise UserError(
            f"tokenizer.model={model}: no such folder, and the Hugging Face hub cannot provide it: {error}; "
            "without internet access, copy its tokenizer.json and tokenizer_config.json and name their folder"
        ) from None
    if path is None:
        raise UserError(f"tokenizer.model={model} has no tokenizer.json; convert it to a fast tokenizer first")
    return path, configs


def _named_token(configs: list[Path], name: str) -> str | None:
    """The token that the configuration files give for `name`, such as eos_token."""
    for path in configs:
        try:
            token = json.loads(path.read_bytes()).get(name)
        except (OSError, ValueError, AttributeError):
            continue
        # Either the text, or the text with its properties.
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return None


def _pad_token(tokenizer: "Tokenizer", configs: list[Path], eod_token: str) -> str | None:
    """The tokenizer's padding token: as stated, or a special token so named (GPT-NeoX-20B states neither of its two).

    Never the end-of-document token: padding is excluded from the loss, so a fine-tuned model would not learn to stop.
    """
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    named = [token for token in special if re.fullmatch(r"[<\[]\|?_?pad(ding)?_?\|?[>\]]", token, re.IGNORECASE)]
    for token in (_named_token(configs, "pad_token"), *named):
        if token is not None and token != eod_token and tokenizer.token_to_id(token) is not None:
            return token
    return None
