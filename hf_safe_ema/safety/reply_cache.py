"""What came of a chat, and a file that remembers it.

Knows: SQLite, and that a cache which fails must not stop a run. Does not know: what was asked (only its hash), or of whom.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

LOCK_TIMEOUT = 5.0
"""Seconds that a write to the cache waits for another process."""


@dataclass(frozen=True)
class Reply:
    """What came of one chat.

    Args:
        text (`str`, *optional*):
            As the endpoint gave it; None if it gave none.
        failure (`str`, *optional*):
            None, or in a few words why there is no usable text.
        input_tokens, output_tokens (`int`, *optional*, defaults to 0):
            Of all tries together: the endpoint's count, or ours (4 characters a token) where it gives none.
        cached (`bool`, *optional*, defaults to `False`):
            Whether it was remembered; the tokens are then those of the time when it was asked.
    """

    text: str | None = None
    failure: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False


class ReplyCache:
    """Replies in an SQLite file, by the hash of what was asked: neither requests nor keys are in it.

    Several processes may use one file. If it cannot be used, be it from the start or later, that is logged once and nothing
    more is remembered.

    Args:
        path (path):
            Made if missing, with its folder.

    Raises:
        ValueError: for a file that is something else, or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.works = True
        if self.path.is_dir():
            raise ValueError(f"cache={str(path)!r} is a folder; give the path of a file, such as 'judge.sqlite'")
        with self._logged_once():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open_first()

    def get(self, key: str) -> Reply | None:
        """The reply under a key, or None.

        Args:
            key (`str`):
                A hash.
        """
        rows = []
        with self._logged_once():
            if self.works:
                rows = self._execute("SELECT text, input_tokens, output_tokens FROM replies WHERE key = ?", (key,))
        return Reply(rows[0][0], None, rows[0][1], rows[0][2], cached=True) if rows else None

    def put(self, key: str, reply: Reply) -> None:
        """Remember a reply.

        Args:
            key (`str`):
                A hash.
            reply ([`Reply`]):
                One without a failure.
        """
        with self._logged_once():
            if self.works:
                row = (key, reply.text, reply.input_tokens, reply.output_tokens)
                self._execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def _open_first(self) -> None:
        try:
            self._execute(
                "CREATE TABLE IF NOT EXISTS replies "
                "(key TEXT PRIMARY KEY, text TEXT, input_tokens INTEGER, output_tokens INTEGER)"
            )
            self._execute("SELECT text, input_tokens, output_tokens FROM replies LIMIT 1")
            damage = self._execute("PRAGMA quick_check(1)")[0][0]
        except sqlite3.DatabaseError as error:
            # Of the operational errors (locked, no access), only this one says what the file is.
            if isinstance(error, sqlite3.OperationalError) and "no such column" not in str(error):
                raise
            damage = str(error)
        if damage != "ok":
            raise ValueError(
                f"cache={str(self.path)!r} is not a cache of replies, or it is damaged ({damage}); delete it, or give another path"
            )

    def _execute(self, statement: str, values: tuple = ()) -> list[tuple]:
        # A connection each: they may not cross threads, and must not cross a fork.
        with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _logged_once(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.works = False
            logger.warning(f"cache={str(self.path)!r} cannot be used ({error}): going on without it")
