"""Histories of real runs, and whether they can be true.  Knows nothing of minray: it looks from outside.

A history is what the users of a system have seen: one JSON object a line, in a file to which threads of the driver and
tasks in workers append at once.  An operation begins with an *invoke* and ends with *ok* (and what it gave), *fail* (it
certainly did not happen) or *unknown* (nobody can tell).  Times are of the one monotonic clock of the machine.

    attempt  a task's body, told by itself: `subject` names the task.  ok: what it is about to return.
    get      of the result of the task `subject`.  ok: the value that was got.
    append   of the entry `input`, [caller, number], to the ledger `subject`.  ok: the whole ledger after it.
    read     of the ledger `subject`.  ok: the whole ledger.

`check` says what cannot be (an empty list: the history can be true):

* every operation ends, once (those of *mortal* processes, which may be killed in the middle, need not);
* a task's value is the same for everybody who gets it, and an attempt of it that had begun by then has made it;
* a ledger is one sequence that explains every reply: each reply is a beginning of it that ends with its own entry, no
  entry is in it twice, or unless somebody has appended it, or if its append failed; the entries of one caller stand in
  the order of their numbers; and what had ended before something else was invoked stands before it.

Considered: a general checker of linearizability.  Replies that hold the whole state make it a matter of sorting.
"""

import json
import os
import threading
import time
from collections import Counter, defaultdict


class Recorder:
    """Appends to the file of that path; may be pickled, and used by many processes at once."""

    def __init__(self, path):
        self.path = str(path)

    def invoke(self, what, subject, input=None, mortal=False):
        """The operation's name, for its end."""
        op = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        self._write(op=op, event="invoke", what=what, subject=subject, input=input, mortal=mortal)
        return op

    def ok(self, op, value):
        self._write(op=op, event="ok", value=value)

    def fail(self, op, error):
        self._write(op=op, event="fail", value=repr(error))

    def unknown(self, op, error):
        self._write(op=op, event="unknown", value=repr(error))

    def _write(self, **event):
        line = json.dumps({"time_ns": time.monotonic_ns(), **event}) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(fd, line.encode())  # One write: lines of several processes do not mix.
        finally:
            os.close(fd)


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


class Operation:
    def __init__(self, invoke):
        self.what = invoke["what"]
        self.subject = invoke["subject"]
        self.input = invoke["input"]
        self.mortal = invoke["mortal"]
        self.invoked_ns = invoke["time_ns"]
        self.ended_ns = None
        self.end = None  # ok, fail or unknown
        self.value = None

    def __str__(self):
        return f"{self.what} {self.subject}" + ("" if self.input is None else f" {self.input}")


def check(events):
    """What cannot be true in that history, in sentences."""
    faults = []
    operations = _operations(events, faults)
    by_subject = defaultdict(list)
    for operation in operations:
        if operation.end is None and not operation.mortal:
            faults.append(f"{operation} has not ended")
        by_subject[operation.subject].append(operation)
    for subject, of_subject in by_subject.items():
        parts = defaultdict(list)
        for operation in of_subject:
            parts[operation.what].append(operation)
        faults += _check_task(subject, parts["get"], parts["attempt"])
        faults += _check_ledger(subject, parts["append"], parts["read"])
    return faults


def _operations(events, faults):
    operations = {}
    for event in events:
        if event["event"] == "invoke":
            if event["op"] in operations:
                faults.append(f"operation {event['op']} was invoked twice")
            operations[event["op"]] = Operation(event)
            continue
        operation = operations.get(event["op"])
        if operation is None:
            faults.append(f"operation {event['op']} ended and was not invoked")
        elif operation.end is not None:
            faults.append(f"{operation} has ended twice: {operation.end}, {event['event']}")
        else:
            operation.end, operation.value, operation.ended_ns = event["event"], event["value"], event["time_ns"]
    return list(operations.values())


def _check_task(subject, gets, attempts):
    values = {json.dumps(get.value) for get in gets if get.end == "ok"}
    if len(values) > 1:
        yield f"{subject} has {len(values)} values: {', '.join(sorted(values))}"
    if values and any(get.end == "fail" for get in gets):
        yield f"{subject} has a value for some and is an error for others"
    for get in gets:
        made = [attempt for attempt in attempts if attempt.end == "ok" and attempt.value == get.value]
        if get.end == "ok" and not any(attempt.ended_ns <= get.ended_ns for attempt in made):
            yield f"{subject} was got as {json.dumps(get.value)}, which no attempt had made by then"


def _check_ledger(subject, appends, reads):
    replies = [operation for operation in appends + reads if operation.end == "ok"]
    ledger = max((operation.value for operation in replies), key=len, default=[])
    invoked = {json.dumps(append.input): append for append in appends}
    place = {}
    for at, entry in enumerate(map(json.dumps, ledger)):
        if entry in place:
            yield f"{subject}: {entry} is in it twice"
        place[entry] = at
        if entry not in invoked:
            yield f"{subject}: {entry} is in it, and nobody has appended it"
        elif invoked[entry].end == "fail":
            yield f"{subject}: {entry} is in it, and its append failed"
    for operation in replies:
        if operation.value != ledger[: len(operation.value)]:
            yield f"{subject}: the reply to {operation} does not fit the others: {json.dumps(operation.value)}"
        if operation.what == "append" and operation.value[-1:] != [operation.input]:
            yield f"{subject}: the reply to {operation} does not end with it: {json.dumps(operation.value)}"
    numbers = defaultdict(list)
    for caller, number in ledger:
        numbers[caller].append(number)
    for caller, seen in numbers.items():
        if seen != sorted(seen):
            yield f"{subject}: entries of {caller} are out of order: {seen}"
    for entry, count in Counter(json.dumps(append.input) for append in appends).items():
        if count > 1:
            yield f"{subject}: {entry} was appended {count} times, which nobody can tell apart"
    # In order of time: what a reply holds is at least what all earlier replies held (those that had ended before it
    # was invoked), and an append more.
    longest, ended = 0, sorted(replies, key=lambda operation: operation.ended_ns)
    position = 0
    for operation in sorted(replies, key=lambda operation: operation.invoked_ns):
        while position < len(ended) and ended[position].ended_ns < operation.invoked_ns:
            longest = max(longest, len(ended[position].value))
            position += 1
        if len(operation.value) < longest + (operation.what == "append"):
            yield f"{subject}: the reply to {operation} forgets what an earlier one had: {json.dumps(operation.value)}"
