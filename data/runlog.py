"""Reads log.jsonl of a training run, whose lines mta/log.h lists."""
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
