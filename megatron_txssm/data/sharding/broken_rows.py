"""Rows that cannot be used: counted, logged with their place, never silently dropped; too many stop the task."""

from datatrove.utils.logging import logger

from megatron_txssm.data.corpus.manifest import BrokenPlace
from megatron_txssm.errors import UserError

NULL_TEXT = "null text"
EMPTY_TEXT = "empty text"
INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
MISSING_BLOB = "missing blob"
CORRUPT_BLOB = "corrupt blob"
# The only reason that concerns a file: unreadable from some row on, or entirely.
UNREADABLE_FILE = "unreadable file"

# With fewer rows, a share says little: the third row of a good file may be broken.
ROWS_BEFORE_JUDGING = 1000
PLACES_KEPT = 100
PLACES_IN_ERROR = 5
# Maximum characters of a detail, which may quote a row.
LONGEST_DETAIL = 200


class BrokenRows:
    """The broken rows of one task, which reads one subset. Not thread-safe."""

    def __init__(self, subset: str, *, max_broken_fraction: float, max_broken_files: int = 0) -> None:
        self.subset = subset
        self.max_broken_fraction = max_broken_fraction
        self.max_broken_files = max_broken_files
        # Rows read, broken ones included.
        self.rows = 0
        # Reason -> rows, or files for UNREADABLE_FILE.
        self.counts: dict[str, int] = {}
        # The first PLACES_KEPT.
        self.places: list[BrokenPlace] = []

    @property
    def broken_files(self) -> int:
        return self.counts.get(UNREADABLE_FILE, 0)

    @property
    def broken_rows(self) -> int:
        return sum(self.counts.values()) - self.broken_files

    def seen(self, rows: int = 1) -> None:
        """Count rows that were read. UserError if too many of them are broken."""
        before, self.rows = self.rows, self.rows + rows
        if before < ROWS_BEFORE_JUDGING <= self.rows:
            self._judge_rows()

    def report(self, file: str, row: int | None, reason: str, detail: str = "") -> None:
        """Count a broken row, or an unreadable file (row None). UserError if that is one too many.

        Only `seen` counts the row as read. The detail is cut to one line of printable characters.
        """
        place: BrokenPlace = {"file": file, "row": row, "reason": reason, "detail": _one_line(detail)}
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.places) < PLACES_KEPT:
            self.places.append(place)
        self._log(place)
        if reason == UNREADABLE_FILE:
            self._judge_files()
        elif self.rows >= ROWS_BEFORE_JUDGING:
            self._judge_rows()

    def finish(self) -> None:
        """Log a task's totals and check its limits, however few its rows. UserError if too many are broken."""
        if self.counts:
            logger.warning(f"subset {self.subset}: {self._totals()}")
        self._judge_files()
        self._judge_rows()

    def _log(self, place: BrokenPlace) -> None:
        number = self.broken_rows + self.broken_files
        if number <= PLACES_KEPT:
            logger.warning(_shown(place))
        elif number == 10 ** (len(str(number)) - 1):
            logger.warning(f"{self._totals()}; the latest: {_shown(place)}")

    def _judge_rows(self) -> None:
        if self.broken_rows > self.max_broken_fraction * self.rows:
            raise self._too_many("max_broken_fraction", self.max_broken_fraction)

    def _judge_files(self) -> None:
        if self.broken_files > self.max_broken_files:
            raise self._too_many("max_broken_files", self.max_broken_files)

    def _too_many(self, field: str, value: float) -> UserError:
        places = "\n".join(f"  {_shown(place)}" for place in self.places[:PLACES_IN_ERROR])
        return UserError(
            f"subsets.{self.subset}.{field}={value:g} is exceeded: {self._totals()}. The first:\n{places}\n"
            f"Repair the source, or raise subsets.{self.subset}.{field} in the corpus recipe."
        )

    def _totals(self) -> str:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in sorted(self.counts.items()))
        share = self.broken_rows / max(self.rows, 1)
        return f"{self.broken_rows:,} of {self.rows:,} rows broken ({share:.3%}; {reasons})"


def _shown(place: BrokenPlace) -> str:
    row = "" if place["row"] is None else f", row {place['row']}"
    return f"{place['file']}{row}: {place['reason']}" + (f" ({place['detail']})" if place["detail"] else "")


def _one_line(detail: str) -> str:
    # It may quote the broken row: remove control characters, and lone surrogates, which JSON cannot represent.
    printable = "".join(character if character.isprintable() else " " for character in detail[: 2 * LONGEST_DETAIL])
    return " ".join(printable.split())[:LONGEST_DETAIL]
