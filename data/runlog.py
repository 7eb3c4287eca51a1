"""Reads log.jsonl of a training run, whose lines mta/log.h lists."""
import contextlib
import json


def log_events(path):
    """The events of a run's log.jsonl. A torn last line, of a run that was killed or is writing, is none."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                event = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise ValueError("%s:%d: no JSON" % (path, number))
                return
            if not isinstance(event, dict):
                raise ValueError("%s:%d: no event, wanted an object" % (path, number))
            yield event


@contextlib.contextmanager
def events_of_a_run(path):
    """Around what takes values out of the events: where one is missing or of another kind, the log is named."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and str(error).startswith(path):  # named already
            raise
        why = "no %s" % error if isinstance(error, KeyError) else error
        raise ValueError("%s: an event that is none of a run: %s" % (path, why)) from None
