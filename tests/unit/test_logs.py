"""Log lines are for machines first: each one object, its facts as fields."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

from workers.logs import JsonLines


def line(**extra: object) -> dict[str, object]:
    record = logging.getLogger("workers.test").makeRecord(
        "workers.test", logging.WARNING, "file", 1, "worker %s", ("lost",), None, extra=extra
    )
    found: dict[str, object] = json.loads(JsonLines().format(record))
    return found


def test_a_fact_is_a_field_of_its_own() -> None:
    found = line(worker="decode-0", reason='it said "no"\nand left')
    assert found.pop("at")
    assert found == {
        "level": "warning",
        "logger": "workers.test",
        "message": "worker lost",
        "worker": "decode-0",
        "reason": 'it said "no"\nand left',
    }


def test_time_is_in_utc_with_milliseconds() -> None:
    record = logging.makeLogRecord({"created": 0.25, "msecs": 250.0})
    assert json.loads(JsonLines().format(record))["at"] == "1970-01-01T00:00:00.250Z"


def test_what_json_has_no_word_for_is_written_as_text() -> None:
    assert line(error=OSError("gone"))["error"] == "gone"


def test_an_exception_comes_with_its_traceback_in_one_line() -> None:
    try:
        raise ValueError("planted")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    text = JsonLines().format(record)
    assert "\n" not in text
    assert "ValueError: planted" in json.loads(text)["exception"]


def test_our_warnings_are_told_whatever_a_library_sets_the_root_s_level_to() -> None:
    code = (
        "import logging; from workers.logs import log_to_stderr; log_to_stderr(); "
        "logging.getLogger().setLevel('ERROR'); "
        "logging.getLogger('router.dispatch').warning('worker lost'); "
        "logging.getLogger('somebody').warning('else')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    (told,) = done.stderr.splitlines()
    assert json.loads(told)["message"] == "worker lost"
