"""The demo's text: the library sources of the Python that runs, about 10 MB on every machine, nothing to download.

What it is: every .py file of the standard library, and the language reference that pydoc carries as plain text.
What is left out: test suites (binary junk on purpose, and many installations lack them), `encodings` (tables so alike
that a validation document would have a near-twin in training), installed packages, and files written for one machine.
"""

import ast
import hashlib
import json
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_txssm.data.shard import ShardCounts, check_shard, write_file_atomically, write_shard
from megatron_txssm.data.tokenizer import (
    encode_documents,
    end_of_document_id,
    is_representable,
    load_tokenizer,
    train_sentencepiece,
)
from megatron_txssm.errors import UserError

MINIMUM_CORPUS_BYTES = 5_000_000
VALIDATION_FRACTION = 0.03
# A single document may not be more than this share of the corpus and still go to validation.
LARGEST_VALIDATION_DOCUMENT = 0.01

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
# Build configuration and site hooks hold the paths of the machine they were made on.
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
REFERENCE_TOPICS = "pydoc_data/topics.py"

MANIFEST_NAME = "manifest.json"
# Raise it when the same sources would no longer give the same files.
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class Document:
    """One text. `source` is its path below the library's folder, with forward slashes."""

    source: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class DemoData:
    """What `prepare_demo_data` made: Megatron data prefixes, the tokenizer, and how much there is of everything."""

    train_prefix: str
    validation_prefix: str
    tokenizer_model: str
    vocab_size: int
    # Id of the token that ends each document.
    eod: int
    train: ShardCounts
    validation: ShardCounts
    # UTF-8 bytes of the text of each split.
    train_text_bytes: int
    validation_text_bytes: int
    # Files that could not be read as text, or hold a character the tokenizer keeps to itself.
    skipped_documents: int
    # Version of the Python whose library this is.
    python_version: str


def collect_documents(
    root: str | Path | None = None,
    *,
    minimum_bytes: int = MINIMUM_CORPUS_BYTES,
    skipped: list[str] | None = None,
) -> Iterator[Document]:
    """The documents in the order of their paths, each text once; fewer than `minimum_bytes` is a UserError.

    root: the library's folder; by default that of the running Python.
    skipped: receives the sources of files that are not readable text.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    skipped = [] if skipped is None else skipped
    seen: set[bytes] = set()
    documents: list[Document] = []
    sources = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    for source, path in sources:
        if not _is_wanted(source):
            continue
        try:
            # tokenize.open obeys the file's own encoding line.
            with tokenize.open(path) as stream:
                text = stream.read()
            if source == REFERENCE_TOPICS:
                text = _reference_text(text)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            skipped.append(source)
            continue
        if not is_representable(text):
            skipped.append(source)
            continue
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        documents.append(Document(source, text))

    found_bytes = sum(document.num_bytes for document in documents)
    if found_bytes < minimum_bytes:
        raise UserError(
            f"demo corpus: {root} holds {found_bytes / 1e6:.1f} MB of Python sources ({len(documents)} files, "
            f"{len(skipped)} unreadable), the demo needs {minimum_bytes / 1e6:.1f} MB; use a Python whose standard "
            "library is installed as .py files: from pyenv, uv, conda or python.org (Debian: libpython3-stdlib)"
        )
    return iter(documents)


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split whole documents into (training, validation), both in the order given.

    Documents join validation in the order of a hash of their path until it holds 3% of the bytes, so the choice is
    random over the library, the same on every run, and close to its size although documents differ by 1,000 times.
    """
    total_bytes = sum(document.num_bytes for document in documents)
    chosen: set[str] = set()
    chosen_bytes = 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.source.encode("utf-8")).digest()):
        if chosen_bytes >= VALIDATION_FRACTION * total_bytes:
            break
        if document.num_bytes <= LARGEST_VALIDATION_DOCUMENT * total_bytes:
            chosen.add(document.source)
            chosen_bytes += document.num_bytes
    train = [document for document in documents if document.source not in chosen]
    validation = [document for document in documents if document.source in chosen]
    return train, validation


def prepare_demo_data(
    directory: str | Path,
    *,
    vocab_size: int,
    root: str | Path | None = None,
    minimum_bytes: int = MINIMUM_CORPUS_BYTES,
) -> DemoData:
    """Make the demo's tokenizer, training and validation shards below `directory`, or reuse them if complete.

    Files lie in DIRECTORY/vocab_N, so another vocabulary never meets the dataset cache Megatron keeps per path. The
    manifest is written last: without it, or when a file does not fit it, everything is made again. The same Python
    gives the same bytes. Call it from one process, before the workers start.
    """
    directory = Path(directory) / f"vocab_{vocab_size}"
    ready = _read_complete(directory, vocab_size)
    if ready is not None:
        return ready

    skipped: list[str] = []
    train, validation = split_documents(list(collect_documents(root, minimum_bytes=minimum_bytes, skipped=skipped)))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST_NAME).unlink(missing_ok=True)
        # Only training text, so nothing of the validation split is known before it is measured.
        model_path = train_sentencepiece((document.text for document in train), directory / "tokenizer", vocab_size)
        tokenizer = load_tokenizer(model_path)
        eod = end_of_document_id(tokenizer)
        counts = {}
        for name, documents in (("train", train), ("validation", validation)):
            ids = encode_documents(tokenizer, (document.text for document in documents))
            shard = write_shard(ids, directory / name, vocab_size, eod, total_documents=len(documents))
            counts[name] = asdict(shard)
        manifest = {
            "format": MANIFEST_FORMAT,
            "vocab_size": vocab_size,
            "eod": eod,
            **counts,
            "train_text_bytes": sum(document.num_bytes for document in train),
            "validation_text_bytes": sum(document.num_bytes for document in validation),
            "skipped_documents": len(skipped),
            "python_version": platform.python_version(),
            "tokenizer_sha256": hashlib.sha256(model_path.read_bytes()).hexdigest(),
        }
        write_file_atomically(directory / MANIFEST_NAME, (json.dumps(manifest, indent=2) + "\n").encode("utf-8"))
    except OSError as error:
        raise UserError(
            f"demo data directory {directory}: {error.strerror or error}; choose a directory that can be written to"
        ) from error
    return _demo_data(directory, manifest)


def _is_wanted(source: str) -> bool:
    parts = source.split("/")
    return not EXCLUDED_FOLDERS.intersection(parts) and not parts[0].startswith(EXCLUDED_PREFIXES)


def _reference_text(module_source: str) -> str:
    """The language reference as plain text, out of the one dictionary literal that pydoc_data/topics.py consists of."""
    for statement in ast.parse(module_source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    raise ValueError("no dictionary of topics found")


def _read_complete(directory: Path, vocab_size: int) -> DemoData | None:
    """The data of a complete directory, or None where anything is missing or does not fit the manifest."""
    try:
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        data = _demo_data(directory, manifest)
        complete = (
            manifest["format"] == MANIFEST_FORMAT
            and data.vocab_size == vocab_size
            and check_shard(data.train_prefix) == data.train
            and check_shard(data.validation_prefix) == data.validation
            and hashlib.sha256(Path(data.tokenizer_model).read_bytes()).hexdigest() == manifest["tokenizer_sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return data if complete else None


def _demo_data(directory: Path, manifest: dict) -> DemoData:
    """The manifest holds no paths, so a directory may be moved."""
    return DemoData(
        train_prefix=str(directory / "train"),
        validation_prefix=str(directory / "validation"),
        tokenizer_model=str(directory / "tokenizer.model"),
        vocab_size=manifest["vocab_size"],
        eod=manifest["eod"],
        train=ShardCounts(**manifest["train"]),
        validation=ShardCounts(**manifest["validation"]),
        train_text_bytes=manifest["train_text_bytes"],
        validation_text_bytes=manifest["validation_text_bytes"],
        skipped_documents=manifest["skipped_documents"],
        python_version=manifest["python_version"],
    )
