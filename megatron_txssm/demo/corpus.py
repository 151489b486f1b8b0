"""The demo's text: the running Python's standard library, about 10 MB on every machine, without a download.

Included: every .py file of the standard library, and the language reference that pydoc contains as plain text.
Excluded: test suites (deliberate binary junk, and many installations lack them), `encodings` (its tables are so similar
that a validation document would have a near-duplicate in training), installed packages, and machine-specific files.
"""

import ast
import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_txssm.data.corpus.manifest import Corpus, is_held_out, open_corpus
from megatron_txssm.data.corpus.verify import remove_faulty_tasks
from megatron_txssm.data.sharding.make import shard
from megatron_txssm.data.tokenizer.sentencepiece import is_representable, train_sentencepiece
from megatron_txssm.errors import UserError
from megatron_txssm.files import write_file_atomically
from megatron_txssm.recipe.corpus.loader import load_corpus_recipe
from megatron_txssm.recipe.corpus.schema import CorpusRecipe

MINIMUM_CORPUS_BYTES = 5_000_000
DOCUMENTS_PER_FILE = 250
CORPUS_RECIPE = "python_library"
SUBSET = "python-library"

EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
# Build configuration and site hooks contain machine-specific paths.
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
REFERENCE_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One text. `source` is its path below the library's folder, with forward slashes."""

    source: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8."""
        return len(self.text.encode("utf-8"))


def collect_documents(
    root: str | Path | None = None,
    *,
    minimum_bytes: int = MINIMUM_CORPUS_BYTES,
    skipped: list[str] | None = None,
) -> Iterator[Document]:
    """The documents in order of path, each text once; UserError for less than `minimum_bytes`.

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
            # tokenize.open honours the file's encoding declaration.
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


def prepare_demo_corpus(
    directory: str | Path,
    *,
    vocab_size: int,
    root: str | Path | None = None,
    minimum_bytes: int = MINIMUM_CORPUS_BYTES,
) -> Corpus:
    """Make the demo's corpus in DIRECTORY/vocab_N, or reuse it if it matches its manifests.

    Every vocabulary size has its own folder, because Megatron keeps its dataset cache per path. The same Python gives
    the same bytes. Call it from one process, before the workers start.
    """
    directory = Path(directory) / f"vocab_{vocab_size}"
    source = directory / "source"
    recipe = load_corpus_recipe(
        CORPUS_RECIPE,
        [
            f"output={directory}",
            f"tokenizer.model={source / 'tokenizer.model'}",
            f"subsets.{SUBSET}.source={source}",
        ],
    )
    try:
        if not (source / "tokenizer.model").exists():
            _write_source(source, list(collect_documents(root, minimum_bytes=minimum_bytes)), recipe, vocab_size)
        remove_faulty_tasks(directory)
        shard(recipe, workers=len(os.sched_getaffinity(0)))
    except OSError as error:
        raise UserError(
            f"demo data directory {directory}: {error.strerror or error}; choose a directory that can be written to"
        ) from error
    return open_corpus(directory)


def _write_source(source: Path, documents: list[Document], recipe: CorpusRecipe, vocab_size: int) -> None:
    """Write the documents as .jsonl, then the tokenizer, whose presence marks both as complete."""
    source.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(documents), DOCUMENTS_PER_FILE)):
        lines = [
            json.dumps({"path": document.source, "text": document.text}, ensure_ascii=False) + "\n"
            for document in documents[start : start + DOCUMENTS_PER_FILE]
        ]
        write_file_atomically(source / f"{number:03d}.jsonl", "".join(lines).encode())
    # Only training text, so that the tokenizer has not seen the validation split.
    fraction = recipe.subsets[SUBSET].validation_fraction
    texts = (document.text for document in documents if not is_held_out(document.text, fraction))
    train_sentencepiece(texts, source / "tokenizer", vocab_size)


def _is_wanted(source: str) -> bool:
    parts = source.split("/")
    return not EXCLUDED_FOLDERS.intersection(parts) and not parts[0].startswith(EXCLUDED_PREFIXES)


def _reference_text(module_source: str) -> str:
    """The language reference as plain text, from the dictionary literal in pydoc_data/topics.py."""
    for statement in ast.parse(module_source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    raise ValueError("no dictionary of topics found")
