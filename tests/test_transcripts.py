"""The protocol, told in stories: tests/transcripts/*.txt are conversations with a node, whole and exact.

Each file is played against a real `Node`, which is checked (`Node.check`) after every event; what it
says must be what stands there.  After a deliberate change

    python tests/test_transcripts.py --write

writes the new conversations, and a reviewer reads the difference.  The notation, by the first sign of a line:

    @ node cpus=1 workers=1     before the story: the node (store=1MB is its arena), and options that are not the
    @ f max_retries=1           defaults: of a function f, an actor class Counter, a method Counter.add;
    @ f group=P/0               group=P: in that placement group, P/0 in its first bundle, P/0+ with its children
    > worker-1 TasksFinished A="42"     an event of messages.py, and from whom; "5 ms later, " may stand before it
    < worker-2 StartWorker      what the node commands because of it: all of it, in this order, or `nothing`
    < clock ticks in 5 ms       when the node next wants to be told that time has passed, if that has changed
    * task_retried A: ...       what it notes for `minray story`
    ? A                         a question about A, answered by the lines with = from the node's tables

and all else is prose.  ``A=f(B, [C], 7)`` names a task: B is an argument that it waits for, C a ref inside
one.  ``"42"`` is a value that travels in messages, ``400KB@0`` one that lies at 0 in the arena, or in that file.
Of several nodes the first is `@ head`, the next `@ node-2`; n2/worker-1 is a worker of that one, and `> n2/worker-1 …` what it says.
What a node tells another is delivered at once: what that does stands right behind.  `net` is the shell that copies values.

``A.1`` is a second return, ``K.c1`` a checkpoint, ``#7`` a request.  Of a generator (``streaming=1``) ``A.1`` is
its reader, ``A.2`` its item 0.  What keeps an object is counted: refs to it, views
into its memory, and tasks whose replay would need it.

Left out, for it follows from the rest, and is compared with that: what a function's pickle and its options are; pids
(100 + N); who defines a function to the node (whoever submits its first task, just before).  A task took 10 ms, if nothing
else is said.  What introduces a task to a worker stands on one line.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from minray import cluster_messages, ids, messages
from minray.actor_table import Recovery
from minray.cluster_messages import HEAD, NodeJoined
from minray.cluster_node import ClusterNode
from minray.messages import DRIVER, Command, Event, FetchObject, TaskSpec, TellNode
from minray.node import Node
from minray.scheduler import Scheduler
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, ACTOR_STATES, CANCELLED, ERROR, OK, PENDING_ARGS_AVAIL,
    RETRYABLE_ERROR, TASK, TASK_STATES, UNIT, ActorOptions, TaskOptions,
)  # fmt: skip

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
SHOWN = Path(__file__).parent / "transcripts" / "a_worker_is_killed.txt"
BETWEEN = "<!-- transcript:begin -->\n", "<!-- transcript:end -->\n"
ROOT = ids.root_task_id(b"transcript")
NONE = pickle.dumps(None, 5)
SIZES = {"KB": 1 << 10, "MB": 1 << 20, "B": 1, "": 1}
OF_TASKS = (
    "num_returns", "max_retries", "max_concurrency", "max_calls", "checkpoint_every", "checkpoint_interval_s",
    "streaming", "backpressure",
)  # fmt: skip
OF_ACTORS = ("name", "namespace", "max_restarts")
INTRODUCTIONS = (
    messages.AssignResources, messages.DefineFunction, messages.DefineTemplate, messages.SetUpEnvironment,
)  # fmt: skip


def split(text: str) -> list[str]:
    """At the commas that stand in no quotes and no brackets."""
    return [part.strip() for part in re.findall(r'(?:"[^"]*"|\([^()]*\)|\[[^]]*\]|[^,])+', text)]


def size_of(text: str) -> int:
    found = re.fullmatch(r"(\d+)(B|KB|MB|)", text)
    assert found, f"{text!r} is not a size"
    return int(found[1]) * SIZES[found[2]]


def size_in_words(size: int) -> str:
    unit = next(unit for unit in ("MB", "KB", "") if not size % SIZES[unit])
    return f"{size // SIZES[unit]}{unit}" if size else "0"


def counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


class World:
    """A node, and everybody's words to it and from it."""

    def __init__(self, cpus: str = "1", workers: str = "1", store: str = "1MB", **more: str) -> None:
        resources = {"CPU": int(cpus), **{name: int(amount) for name, amount in more.items()}}
        self.ids: dict[str, bytes] = {}
        self.names: dict[bytes, str] = {ROOT: "driver"}
        self.children: Counter[bytes] = Counter()
        self.puts: Counter[bytes] = Counter()
        self.options: dict[str, TaskOptions] = {}
        self.actor_options: dict[str, dict[str, Any]] = {}
        self.class_of: dict[bytes, str] = {}  # by actor
        self.defined: set[tuple[int, str]] = set()  # (client, what)
        self.told: dict[tuple[int, int], str] = {}  # (worker, template number) -> what
        self.driver_holds: Counter[bytes] = Counter()
        self.seen: set[type] = set()
        self.now = 1000.0
        self.started = int(workers)  # the last worker that the node has asked for
        self.node = self.make_node(
            {name: amount * UNIT for name, amount in resources.items()}, size_of(store),
            lambda object_id: f"spill/{self.name(object_id)}",
        )  # fmt: skip
        for command in self.node.start_workers(int(workers)):
            self.handle(messages.WorkerStarted(command.client, 100 + command.client))
        self.wake_at = self.node.wake_at

    def make_node(self, *args: Any) -> Node:
        return Node(*args)

    # ------------------------------------------------------------ names

    def id(self, name: str) -> bytes:
        if name not in self.ids:
            base, _, suffix = name.partition(".")
            assert base in self.ids and suffix, f"nothing is called {name}"
            count = int(suffix.lstrip("c"))
            made = ids.checkpoint_id(self.ids[base], count) if suffix[0] == "c" else ids.return_id(self.ids[base], count)
            self.call(made, name)
        return self.ids[name]

    def call(self, some_id: bytes, name: str) -> bytes:
        self.ids[name] = some_id
        self.names[some_id] = name
        return some_id

    def new_object(self, name: str, by: bytes) -> bytes:
        """One that is put, unless it is known."""
        if "." not in name and name not in self.ids:
            self.puts[by] += 1
            self.call(ids.put_id(by, self.puts[by]), name)
        return self.id(name)

    def all_ids(self, text: str) -> list[bytes]:
        return [self.id(name) for name in split(text)]

    def name(self, some_id: bytes) -> str:
        if some_id in self.names:
            return self.names[some_id]
        short, task = ids.short(some_id), self.names.get(ids.task_of(some_id))
        return f"{task}.{short.partition('.')[2]}" if task is not None and "." in short else short

    def all_names(self, some_ids: Any) -> str:
        return ", ".join(map(self.name, some_ids)) or "none"

    def text(self, text: str) -> str:
        """A text of the node's with our names in it."""
        known = {ids.short(some_id): name for some_id, name in self.names.items() if some_id != ROOT}
        return re.sub(r"\b[0-9a-f]{4}-\d+(\.\w+)?\b", lambda found: known.get(found[0], found[0]), text)

    # ------------------------------------------------------------ what stands in a file: events

    def define(self, what: str, given: dict[str, str]) -> None:
        is_class, method = what[0].isupper() and "." not in what, what.partition(".")[2]
        options = TaskOptions(
            ACTOR_CREATION if is_class else ACTOR_METHOD if method else TASK,
            b"" if method else what.encode().ljust(16, b"\0"), what, method,
            resources=() if is_class or method else (("CPU", UNIT),), max_retries=0 if is_class or method else 3,
        )  # fmt: skip
        actor = self.actor_options.setdefault(what, {})
        for key, value in given.items():
            if key in OF_TASKS:
                options = options._replace(**{key: type(getattr(options, key))(float(value))})
                if key == "streaming":
                    options = options._replace(num_returns=2)
            elif key == "group":  # P: any bundle of that placement group; P/0: the first; P/0+: children go there, too
                name, _, index = value.rstrip("+").partition("/")
                options = options._replace(placement=(self.id(name), int(index or -1), value.endswith("+")))
            elif key in OF_ACTORS:
                actor[key] = int(value) if key == "max_restarts" else value
            elif key == "runtime_env":
                options = options._replace(runtime_env=json.dumps({"env_vars": {"NAME": value}}))
            elif key == "detached":
                actor[key] = True
            else:
                name = {"cpus": "CPU"}.get(key, key)
                rest = tuple(pair for pair in options.resources if pair[0] != name)
                more = ((name, round(float(value) * UNIT)),) if float(value) else ()
                options = options._replace(resources=tuple(sorted(rest + more)))
        self.options[what] = options

    def template_no(self, client: int, what: str) -> int:
        """By which `client` means it; made known to the node with its first use."""
        if what not in self.options:
            self.define(what, {})
        number = list(self.options).index(what) + 1
        if (client, what) not in self.defined:
            self.defined.add((client, what))
            options = self.options[what]
            if options.function_id:
                exported = messages.FunctionExported(client, options.function_id, f"code of {what}".encode(), what, "m", None)
                assert not self.handle(exported)
            assert not self.handle(messages.TemplateDefined(client, number, options))
        return number

    def spec(self, client: int, parent: bytes, text: str) -> TaskSpec:
        found = re.fullmatch(r"(\w+)=([\w.]+)\((.*)\)", text)
        assert found, f"{text!r} is no call such as A=f(B)"
        name, what, args = found.groups()
        actor_id = None
        if "." in what and what.partition(".")[0] in self.ids:
            actor_id = self.ids[what.partition(".")[0]]
            what = f"{self.class_of[actor_id]}.{what.partition('.')[2]}"
        if name not in self.ids:
            of = self.node.lineage.tasks.get(parent)
            prefix = ids.children_prefix(parent, of.raised if of is not None else 0)
            self.children[prefix] += 1
            self.call(ids.pack_id(prefix, self.children[prefix], 0), name)
        given = split(args)
        deps = tuple(self.id(one) for one in given if re.fullmatch(r"[A-Za-z][\w.]*", one))
        nested = tuple(self.id(one) for arg in given if arg[0] == "[" for one in split(arg[1:-1]))
        rest = ", ".join(one for one in given if not re.fullmatch(r"[A-Za-z][\w.]*", one))
        number = self.template_no(client, what)
        actor = None
        if self.options[what].kind == ACTOR_CREATION:
            actor = ActorOptions(what, **self.actor_options[what])
            self.class_of[self.ids[name]] = what
        return TaskSpec(self.ids[name], number, rest.encode() or None, deps, nested, actor_id, actor)

    def value(self, text: str) -> tuple[Any, int, tuple[bytes, ...]]:
        found = re.fullmatch(r'(?:"(?P<text>[^"]*)"|(?P<size>\w+)@(?P<where>\S+)|None)(?: \[(?P<nested>.*)\])?', text)
        assert found, f'{text!r} is no value such as "42" or 400KB@0'
        nested = tuple(self.all_ids(found["nested"])) if found["nested"] else ()
        if found["size"]:
            return self.place(found["where"]), size_of(found["size"]), nested
        data = NONE if found["text"] is None else found["text"].encode()
        return data, len(data), nested

    def place(self, text: str) -> int | str:
        return size_of(text) if text[0].isdigit() else text

    def result(self, text: str) -> tuple[bytes, int, Any, float, float]:
        took = re.search(r" took ([\d.]+) ms$", text)
        started = self.now - (float(took[1]) if took else 10) / 1000
        text = text[: took.start()] if took else text
        if found := re.fullmatch(r"(\w+)=(.*)", text):
            returns = found[2][1:-1] if found[2][0] == "(" else found[2]
            values = [self.value(one) for one in split(returns)]
            is_plain = len(values) == 1 and type(values[0][0]) is bytes and not values[0][2]
            return self.id(found[1]), OK, values[0][0] if is_plain else values, started, self.now
        found = re.fullmatch(r'(\w+) (?:(cancelled|exited)|raised "([^"]*)"( retryable)?)', text)
        assert found, f"{text!r} is no result"
        word = found[3] or {"cancelled": "cancelled", "exited": "it called exit_actor()"}[found[2]]
        status = {"cancelled": CANCELLED, "exited": ACTOR_EXITED, None: RETRYABLE_ERROR if found[4] else ERROR}[found[2]]
        return self.id(found[1]), status, (word.encode() if found[3] else b"", word), started, self.now

    def amounts(self, text: str) -> tuple[tuple[str, int], ...]:
        pairs = (one.split() for one in split(text))
        return tuple(sorted((name, round(float(amount) * UNIT)) for name, amount in pairs))

    def lost(self, text: str) -> tuple[bytes, Any, str]:
        found = re.fullmatch(r'([\w.]+)(?:@(\S+))? "([^"]*)"', text)
        assert found, f'{text!r} does not say what was lost where: A@spill/A-1 "why"'
        return self.id(found[1]), self.place(found[2]) if found[2] else None, found[3]

    def event(self, client: int, kind: str, text: str) -> Any:
        asked, by = 0, ROOT
        if found := re.match(r"#(\d+)( |$)", text):
            asked, text = int(found[1]), text[found.end() :]
        if found := re.match(r"by (\w+): ", text):
            by, text = self.id(found[1]), text[found.end() :]
        parts = split(text)
        cls = getattr(messages, kind)
        if kind == "TasksSubmitted":
            return cls(client, by, [self.spec(client, by, one) for one in parts])
        if kind == "TasksFinished":
            return cls(client, [self.result(one) for one in parts])
        if kind == "ItemsYielded":
            name, _, items = text.partition(": ")
            first, values = int(items.partition("=")[0]), [self.value(one.partition("=")[2]) for one in split(items)]
            return cls(client, self.id(name), first, values)
        if kind == "ItemsRequested":
            found = re.fullmatch(r"(\w+) from (\d+), up to (\d+)", text)
            assert found, f"{text!r} is not: #1 A from 0, up to 100"
            return cls(client, asked, self.id(found[1]), int(found[2]), int(found[3]))
        if kind == "RoomAwaited":
            return cls(client, asked, self.id(text), True)
        if kind == "TasksReturned":
            forgets = re.search(r"; after (\d+) Forget", text)
            return cls(client, self.all_ids(text.partition(";")[0]), int(forgets[1]) if forgets else 0)
        if kind == "ObjectPut":
            name, _, value = (parts[0]).partition("=")
            return cls(client, self.new_object(name, by), self.value(value))
        if kind == "ReferencesChanged":
            signs = {sign: [self.id(one[1:]) for one in parts if one[0] == sign] for sign in "+-"}
            assert len(parts) == sum(map(len, signs.values())), f"{text!r}: each is + or -"
            return cls(client, signs["+"], signs["-"])
        if kind == "Unpinned":
            return cls(client, self.all_ids(text))
        if kind == "ObjectsAwaited":
            found = re.fullmatch(r"(get|wait for (\d+) of) (.*)", text)
            assert found, f"{text!r} is not: #1 get A, B, nor: #1 wait for 1 of A, B"
            wanted = self.all_ids(found[3])
            return cls(client, asked, wanted, int(found[2] or len(wanted)), found[1] == "get", client != DRIVER)
        if kind == "RequestAbandoned":
            return cls(client, asked)
        if kind in ("BlockRequested", "BlockRefused", "BlocksSpilled"):
            found = re.fullmatch(r"([\w.]+)=(\w+)(?: at (\w+))?(?:: (.*))?", text)
            assert found, f"{text!r} is not: #1 A=400KB"
            fields = self.new_object(found[1], by), size_of(found[2])
            if kind == "BlockRefused":
                return cls(client, asked, fields[0], size_of(found[3]), fields[1])
            if kind == "BlockRequested":
                return cls(client, asked, *fields)
            pairs = [one.partition(" to ") for one in split(found[4])]
            return cls(client, asked, [(self.id(one.removesuffix(" failed")), path) for one, _, path in pairs], *fields)
        if kind == "RoomAbandoned":
            return cls(client, self.id(text))
        if kind == "ObjectLost":
            return cls(client, *self.lost(text), asked)
        if kind == "ArgumentLost":
            task, _, what = text.partition(": ")
            return cls(client, self.id(task), *self.lost(what))
        if kind == "CancelRequested":
            return cls(client, self.id(parts[0]), "force" in parts, "not recursive" not in parts, asked)
        if kind == "ActorKillRequested":
            return cls(client, self.id(parts[0]), "may restart" not in parts)
        if kind == "CheckpointTaken":
            name, _, value = parts[0].partition("=")
            return cls(client, self.id(name), self.value(value), "whole" in parts)
        if kind == "CheckpointFailed":
            found = re.fullmatch(r'([\w.]+) "([^"]*)"(, for good)?', text)
            assert found, f'{text!r} is not: K.c1 "why", for good'
            return cls(client, self.id(found[1]), found[2], bool(found[3]))
        if kind == "ActorLookedUp":
            return cls(client, asked, "", text.strip('"'))
        if kind == "CallsCounted":
            return cls(client, asked, self.id(text))
        if kind == "ResourcesAdded":
            pairs = [one.split() for one in parts]
            return cls(client, tuple((name, round(float(amount) * UNIT)) for name, amount in pairs))
        if kind == "NodeQueried":
            return cls(client, asked, text)
        if kind == "PlacementGroupRequested":
            found = re.fullmatch(r"(\w+)=((?:\([^)]*\) )+)([A-Z_]+)(?: named (\w+))?(, detached)?", text)
            assert found, f"{text!r} is not: P=(CPU 1) (CPU 1, GPU 1) PACK named x"
            bundles = [(self.amounts(one), ()) for one in re.findall(r"\(([^)]*)\)", found[2])]
            value = f"{found[1]} is placed".encode()
            return cls(client, asked, self.new_object(found[1], by), bundles, found[3], found[4] or "", bool(found[5]), value)
        if kind == "PlacementGroupRemoved":
            return cls(client, self.id(text))
        if kind == "GcsStalled":
            error, _, why = text.partition(" ")
            return cls(client, error, why.strip('"'))
        if kind == "GcsRecovered":
            return cls(client)
        if kind == "WorkerStarted":
            return cls(client, 100 + client)
        if kind == "WorkerDied":
            found = re.fullmatch(r'"([^"]*)"(?:, running (\w+))?', text)
            assert found, f'{text!r} is not: "was killed by SIGKILL", running A'
            return cls(client, found[1], self.id(found[2]) if found[2] else None)
        if kind == "Ticked":
            seen = [re.fullmatch(r"worker-(\d+) executes (\w+)", one) for one in parts]
            return cls(DRIVER, tuple((int(one[1]), None if one[2] == "nothing" else self.id(one[2])) for one in seen if one))
        raise AssertionError(f"transcripts have no words for {kind} yet: give it some in {Path(__file__).name}")

    # ------------------------------------------------------------ what the node does

    def handle(self, event: Any) -> list[Command]:
        self.seen.add(type(event))
        self.count_driver_refs(event)
        commands = self.node.handle(event, self.now)
        if isinstance(event, messages.ItemsRequested) and event.client == DRIVER:
            taken = self.node.lineage.tasks[event.task_id].stream.num_taken
            self.driver_holds.update(ids.item_id(event.task_id, item) for item in range(event.position, taken))
        self.node.check(+self.driver_holds)
        self.seen.update(map(type, commands))
        self.started = max([self.started, *(c.client for c in commands if isinstance(c, messages.StartWorker))])
        return commands

    def refuse_nonsense(self, event: Any) -> None:
        """What no worker would say, and the node would pass over in silence: then the story is wrong."""
        worker = self.node.scheduler.workers.get(event.client)
        assert event.client <= self.started, f"worker-{event.client} was never started"
        if isinstance(event, messages.WorkerStarted) and worker is not None:
            assert not worker.pid, f"worker-{event.client} is up"
        if isinstance(event, messages.TasksFinished) and worker is not None:
            for task_id, *_ in event.results:
                assert task_id in worker.in_flight, f"worker-{event.client} has no {self.name(task_id)} in hand"

    def count_driver_refs(self, event: Any) -> None:
        """What the driver holds, so that the node's counts can be checked to the last one."""
        if event.client != DRIVER:
            return
        if isinstance(event, messages.TasksSubmitted):
            for spec in event.specs:
                num_returns = list(self.options.values())[spec.template_no - 1].num_returns
                self.driver_holds.update(ids.return_id(spec.task_id, index) for index in range(num_returns))
        elif isinstance(event, messages.ObjectPut):
            self.driver_holds[event.object_id] += 1
        elif isinstance(event, messages.ReferencesChanged):
            self.driver_holds.update(event.acquired)
            self.driver_holds.subtract(event.released)
        elif isinstance(event, messages.ObjectsAwaited):
            self.driver_holds.update(object_id for object_id in event.object_ids if object_id not in self.node.objects)

    def play(self, line: str) -> Iterator[str]:
        """An event, and what the node does about it."""
        later = re.match(r"([\d.]+) (ms|s) later, ", line)
        if later:
            self.now += float(later[1]) / (1000 if later[2] == "ms" else 1)
            line = line[later.end() :]
        found = re.fullmatch(r"(driver|clock|gcs|net|worker-(\d+)) (\w+)(?::? (.*))?", line)
        assert found, f"{line!r} does not say who and what"
        event = self.event(int(found[2] or DRIVER), found[3], found[4] or "")
        self.refuse_nonsense(event)
        commands = self.handle(event)
        yield from self.notes()
        yield from self.in_words(commands)
        if self.node.wake_at != self.wake_at and self.node.wake_at is not None and self.tells_clock:
            yield f"< clock ticks in {duration(self.node.wake_at - self.now)}"
        elif not commands:
            yield "< nothing"
        self.wake_at = self.node.wake_at

    tells_clock = True

    def notes(self) -> Iterator[str]:
        notes = self.node.take_rows(self.now).get("events", [])
        for _, _, kind, subject, text in notes:
            about = f" {self.name(bytes.fromhex(subject))}" if subject else ""
            yield f"* {kind}{about}: {self.text(text)}"

    def in_words(self, commands: list[Command]) -> Iterator[str]:
        before: Any = None
        line = ""
        for command in commands:
            words = f"{type(command).__name__} {self.command(command)}".rstrip()
            together = isinstance(command, INTRODUCTIONS) and isinstance(before, INTRODUCTIONS)
            if together and command.client == before.client:
                line += f", {words}"
            else:
                if line:
                    yield line
                line = f"< {self.whose(command)} {words}"
            before = command
        if line:
            yield line

    def whose(self, command: Any) -> str:
        client = getattr(command, "client", DRIVER)
        return "disk" if isinstance(command, messages.DeleteFile) else f"worker-{client}" if client else "driver"

    def command(self, command: Any) -> str:
        """Its fields.  What is left out is compared with what it must be."""
        if isinstance(command, messages.DefineFunction):
            what = command.function_id.rstrip(b"\0").decode()
            assert command.pickled == f"code of {what}".encode()
            return what
        if isinstance(command, messages.DefineTemplate):
            what = self.told[command.client, command.template_no] = command.options.name
            assert command.options == self.options[what]
            return what
        if isinstance(command, messages.SetUpEnvironment):
            return str(json.loads(command.runtime_env)["env_vars"]["NAME"])
        if isinstance(command, messages.AssignResources):
            assert command.num_cpus == command.resources.get("CPU", 0)
            amounts = " ".join(f"{name} {amount:g}" for name, amount in command.resources.items()) or "none"
            amounts += f" (GPUs {', '.join(map(str, command.gpu_ids))})" if command.gpu_ids else ""
            if command.placement:
                group, index, captures = command.placement
                amounts += f" in {f'bundle {index} of ' if index >= 0 else ''}{self.name(group)}"
                amounts += " (and children)" if captures else ""
            return amounts
        if isinstance(command, messages.RunTasks):
            return ", ".join(self.task(command.client, *task) for task in command.tasks)
        if isinstance(command, messages.RestoreActor):
            return f"{command.number}: {self.fetched(command.checkpoint)}"
        if isinstance(command, messages.TakeBack):
            return f"up to {command.num_tasks}"
        if isinstance(command, messages.Forget):
            return self.all_names(command.task_ids)
        if isinstance(command, messages.CancelTask):
            return self.name(command.task_id)
        if isinstance(command, messages.Reply):
            return f"#{command.request_id} {self.answer(command.answer)}"
        if isinstance(command, messages.KillWorker):
            return f"if it runs {self.name(command.only_if_running)}" if command.only_if_running else ""
        if isinstance(command, messages.Warn):
            return f'"{self.text(command.text)}"'.replace("\n", " / ")
        if isinstance(command, messages.DeleteFile):
            return command.path
        assert len(command) == 1, f"transcripts have no words for {command} yet: give it some in {Path(__file__).name}"
        return ""

    def task(self, worker: int, task_id: bytes, template_no: int, args: Any, values: Any, mark: int) -> str:
        given = [self.fetched(value) for value in values or ()] + ([args.decode()] if args else [])
        text = f"{self.name(task_id)}={self.told[worker, template_no]}({', '.join(given)})"
        if mark < 0:
            return text + f" (raised before: {-mark})"
        return text + " (may wait for company)" if mark else text

    def fetched(self, value: Any) -> str:
        if value is None:
            return "pending"
        data, size, is_error, object_id = value
        return self.name(object_id) + self.stored(data, size, is_error)

    def stored(self, data: Any, size: int, is_error: bool) -> str:
        if type(data) is not bytes:
            return f"={size_in_words(size)}@{data if type(data) is str else size_in_words(data)}"
        assert size == len(data)
        if data == NONE:
            return "=None"
        if not is_error:
            return f'="{data.decode()}"'
        return f" raised {type(pickle.loads(data)).__name__}" if data[0] == 0x80 else f' raised "{data.decode()}"'

    def answer(self, answer: Any) -> str:
        if isinstance(answer, tuple) and answer[0] in ("block", "spill", "file"):
            if answer[0] == "block":
                return f"block at {size_in_words(answer[1])}" + (", fresh" if answer[2] else "")
            if answer[0] == "file":
                return f"file {answer[1]}"
            victims = [f"{self.name(one)}{self.stored(data, size, False)} to {path}" for one, data, size, path in answer[1]]
            return f"spill {', '.join(victims)}"
        if isinstance(answer, tuple) and type(answer[0]) is int:
            return f"{counted(answer[0], 'item', 'items')}{', no more to come' if answer[1] else ''}"
        if isinstance(answer, tuple):
            return self.name(answer[0])
        if isinstance(answer, list) and answer and isinstance(answer[0], (tuple, type(None))):
            return ", ".join(map(self.fetched, answer))
        return str(answer)

    # ------------------------------------------------------------ questions

    def place_of(self, worker: Any) -> str:
        return f"worker-{worker.client}" if worker.client > 0 else f"node {-worker.client}"

    def about(self, name: str) -> Iterator[str]:
        if found := re.fullmatch(r"worker-(\d+)", name):
            worker = self.node.scheduler.workers[int(found[1])]
            yield f"= in hand {self.all_names(worker.in_flight)}; holds {self.all_names(worker.held)}; views {self.all_names(worker.pins)}"
            return
        some_id, empty = self.id(name), True
        task = self.node.lineage.tasks.get(some_id)
        if task is not None:
            empty = False
            where = f" on {self.place_of(task.worker)}" if task.worker is not None else ""
            waits = f" for {task.missing} of its arguments" if task.state == PENDING_ARGS_AVAIL else ""
            retries = task.retries_left
            left = f"{counted(retries, 'retry', 'retries')} left" if retries >= 0 else "retries without end"
            yield f"= task {TASK_STATES[task.state]}{where}{waits}, attempt {task.attempt}, {left}"
        actor = self.node.actors.actors.get(some_id)
        if actor is not None:
            empty = False
            where = f" in {self.place_of(actor.worker)}" if actor.worker is not None else ""
            yield f"= actor {ACTOR_STATES[actor.state]}{where}, restarted {counted(actor.restarts, 'time', 'times')}"
            if actor.recovery is not None:
                log, start = actor.recovery.log, actor.recovery.checkpoint
                began = "its constructor" if start is None else f"checkpoint {self.name(start)}"
                yield f"= its state is {began}, then {self.all_names(call.spec.task_id for call in log)}"
        for object_id, entry in self.node.objects.items():
            if object_id == some_id or (task is not None and entry.task is task and not actor):
                empty = False
                counts = ((entry.refs, "ref"), (entry.pins, "view"), (entry.replays, "replay"))
                kept = ", ".join(counted(count, what, f"{what}s") for count, what in counts if count)
                value = "=pending" if entry.data is None else self.stored(entry.data, entry.size, entry.is_error)
                if entry.away is not None and entry.away.places:
                    copies = self.stored(tuple(entry.away.places), entry.size, False)
                    value = copies if entry.data is None else f"{value}, and {copies[1:]}"
                yield f"= object {self.name(object_id)}{value}, kept by {kept}"
                if entry.is_error and entry.data[0] == 0x80:
                    yield from (f"=   {self.text(line)}".rstrip() for line in str(pickle.loads(entry.data)).splitlines())
        if empty:
            yield "= nothing: it is forgotten"


class ClusterWorld(World):
    """A node among others.  What it tells another is heard there at once, and told right behind."""

    tells_clock = False  # It beats all the time.
    told = (
        cluster_messages.TasksGiven, cluster_messages.CopiesChanged, cluster_messages.NodeJoined, cluster_messages.NodeDied,
        cluster_messages.ObjectArrived, cluster_messages.ActorSaved,
    )  # fmt: skip
    """The words between nodes that have a story so far; tests/test_cluster_node.py and cluster_simulation.py speak all of them."""

    def __init__(self, number: int = HEAD, head: ClusterWorld | None = None, **given: str) -> None:
        self.number = number
        self.prefix = "" if head is None else f"n{number}/"
        super().__init__(**given)
        self.members: dict[int, ClusterWorld] = {HEAD: self} if head is None else head.members
        if head is not None:
            for shared in ("ids", "names", "children", "puts", "options", "actor_options", "class_of", "seen", "now"):
                setattr(self, shared, getattr(head, shared))
            self.members[number] = self
            self.handle(NodeJoined(-HEAD, "head", head.node.scheduler.total))
            head.handle(NodeJoined(-number, f"n{number}", self.node.scheduler.total))
            for one in (head, self):
                one.node.take_rows(self.now)  # That they have joined is no part of the story.

    def make_node(self, *args: Any) -> Node:
        label = "head" if self.number == HEAD else f"n{self.number}"
        return ClusterNode(*args, label=label, node_no=self.number)

    def play(self, line: str) -> Iterator[str]:
        found = re.fullmatch(r"(.* later, )?(?:n(\d+)/)(.*)", line)
        if found is None:
            yield from super().play(line)
        else:
            member = self.members[int(found[2])]
            member.now = self.now
            yield from member.play((found[1] or "") + found[3])
            self.now = member.now
        if " NodeDied " in line:
            del self.members[int(re.search(r"n(\d+)", line)[1])]  # type: ignore[index]

    def event(self, client: int, kind: str, text: str) -> Any:
        if kind == "ObjectArrived":
            return cluster_messages.ObjectArrived(client, int(text[1:]))
        if kind == "FetchFailed":
            number, _, why = text[1:].partition(" ")
            return cluster_messages.FetchFailed(client, int(number), why.strip('"'))
        if kind == "NodeDied":
            number, _, why = text[1:].partition(" ")
            return cluster_messages.NodeDied(-int(number), why.strip('"'))
        return super().event(client, kind, text)

    def hear(self, events: list[Any]) -> Iterator[str]:
        for event in events:
            commands = self.handle(event)
            yield from self.notes()
            yield from self.in_words(commands)

    def in_words(self, commands: list[Command]) -> Iterator[str]:
        mine: list[Command] = []
        for command in commands:
            if not isinstance(command, TellNode):
                mine.append(command)
                continue
            yield from super().in_words(mine)
            mine = []
            other = self.members.get(-command.client)
            said = ", ".join(f"{type(event).__name__} {self.said(event)}".rstrip() for event in command.events)
            yield f"< {self.prefix or 'head/'}to {other.node.label if other is not None else 'the dead'} {said}"
            if other is not None:
                other.now = self.now
                yield from other.hear(command.events)
        yield from super().in_words(mine)

    def whose(self, command: Any) -> str:
        return self.prefix + ("net" if isinstance(command, FetchObject) else super().whose(command))

    def command(self, command: Any) -> str:
        if isinstance(command, FetchObject):
            source = self.members[-command.client]
            assert source.node.fetch_for_driver(command.object_id) is not None
            source.handle(messages.Unpinned(DRIVER, [command.object_id]))
            label, room = source.node.label, self.answer(command.room)
            return f"#{command.fetch_no} {self.name(command.object_id)}={size_in_words(command.size)} from {label} into {room}"
        return super().command(command)

    def stored(self, data: Any, size: int, is_error: bool) -> str:
        if type(data) is tuple:
            return f"={size_in_words(size)} on {' and '.join(self.members[place].node.label for place in data)}"
        return super().stored(data, size, is_error)

    def said(self, event: Any) -> str:
        """What one node says to another."""
        if isinstance(event, cluster_messages.TasksGiven):
            parts = []
            for spec, template_no, *_ in event.tasks:
                given = [self.name(one) for one in spec.deps] + [f"[{self.name(one)}]" for one in spec.nested]
                given += [spec.args.decode()] if spec.args else []
                parts.append(f"{self.name(spec.task_id)}={self.node.templates[template_no].options.name}({', '.join(given)})")
            values = self.reported(event.values)
            return ", ".join(parts) + (f"; values {values}" if values else "")
        if isinstance(event, messages.TasksFinished):
            return ", ".join(map(self.ended, event.results))
        if isinstance(event, messages.FunctionExported):
            return event.name
        if isinstance(event, messages.TemplateDefined):
            return TaskOptions(*event.options).name
        if isinstance(event, messages.ReferencesChanged):
            return ", ".join([f"+{self.name(one)}" for one in event.acquired] + [f"-{self.name(one)}" for one in event.released])
        if isinstance(event, cluster_messages.CopiesChanged):
            return ", ".join([f"made {self.name(one)}" for one in event.made] + [f"dropped {self.name(one)}" for one in event.dropped])
        if isinstance(event, cluster_messages.ObjectsReported):
            return self.reported(event.reports)
        if isinstance(event, messages.ObjectsAwaited):
            return self.all_names(event.object_ids)
        if isinstance(event, messages.ObjectLost):
            return f'{self.name(event.object_id)} "{event.reason}"'
        if isinstance(event, (cluster_messages.ActorReleased, cluster_messages.ActorLost)):
            return self.name(event.actor_id)
        if isinstance(event, cluster_messages.ActorSaved):
            return self.reported([event.checkpoint]) if event.checkpoint is not None else event.failure
        if isinstance(event, cluster_messages.HandlesNamed):
            return self.all_names(event.actor_ids)
        if isinstance(event, cluster_messages.Expelled):
            return ""
        raise AssertionError(f"transcripts have no words for {event} yet: give it some in {Path(__file__).name}")

    def reported(self, reports: list[Any]) -> str:
        return ", ".join(self.name(one) + self.stored(data, size, is_error) for one, data, size, is_error, _ in reports)

    def ended(self, result: Any) -> str:
        task_id, status, payload, *_ = result
        if status != OK:
            return f'{self.name(task_id)} raised "{self.text(payload[1])}"'
        if type(payload) is bytes:
            return f"{self.name(task_id)} (a replay)"
        return self.name(task_id) + "".join(self.stored(data, size, False) for data, size, _ in payload)

    def about(self, name: str) -> Iterator[str]:
        found = re.fullmatch(r"n(\d+)/(.*)", name)
        if found is not None:
            yield from self.members[int(found[1])].about(found[2])
            return
        yield from super().about(name)


def played(text: str, seen: set[type] | None = None) -> str:
    """The transcript as it comes out today."""
    world: World | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        sign, rest = line[:2], line[2:]
        if sign in ("< ", "* ", "= "):
            continue
        lines.append(line)
        try:
            if sign == "@ ":
                what, *given = rest.split()
                options = dict(re.fullmatch(r"(\w+)=?(.*)", one).groups() for one in given)  # type: ignore[union-attr]
                if what == "node":
                    world = World(**options)  # type: ignore[arg-type]
                elif what == "head":
                    world = ClusterWorld(**options)  # type: ignore[arg-type]
                elif found := re.fullmatch(r"node-(\d+)", what):
                    assert isinstance(world, ClusterWorld), "the head comes first"
                    ClusterWorld(int(found[1]), world, **options)  # type: ignore[arg-type]
                else:
                    assert world is not None, "the node comes first"
                    world.define(what, options)
            elif sign in ("> ", "? "):
                assert world is not None, "there is no node yet: @ node"
                lines += world.play(rest) if sign == "> " else world.about(rest)
        except Exception as error:
            raise AssertionError(f"line {number}: {line}\n{type(error).__name__}: {error}") from error
    assert world is not None, "there is no node in it: @ node"
    if seen is not None:
        seen |= world.seen
    return "\n".join(lines) + "\n"


def compare(expected: str, now: str, name: str) -> None:
    if expected != now:
        lines = difflib.unified_diff(expected.splitlines(), now.splitlines(), f"{name} as written", "as played today", lineterm="")
        pytest.fail("\n".join(lines) + "\nIf it is meant so: python tests/test_transcripts.py --write", pytrace=False)


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_conversation_with_a_node_goes_as_it_is_written(path: Path) -> None:
    text = path.read_text("utf-8")
    compare(text, played(text), path.name)


def test_every_word_of_the_protocol_is_spoken_in_some_transcript() -> None:
    seen: set[type] = set()
    for path in TRANSCRIPTS:
        with contextlib.suppress(AssertionError):  # That is told by the test above.
            played(path.read_text("utf-8"), seen)
    words = (*get_args(Event), *get_args(Command), *ClusterWorld.told)
    unspoken = [cls.__name__ for cls in words if cls not in seen]
    assert not unspoken, f"tell in tests/transcripts what {', '.join(unspoken)} are for"


@pytest.mark.parametrize("sign", ["<", "*", "="])
def test_a_wrong_expectation_is_shown_as_a_difference(sign: str) -> None:
    text = SHOWN.read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"{sign} "))
    with pytest.raises(pytest.fail.Exception, match="as played today"):
        compare(text.replace(line, f"{line} and more"), played(text), SHOWN.name)
    with pytest.raises(pytest.fail.Exception, match="as played today"):
        compare(text.replace(f"{line}\n", ""), played(text), SHOWN.name)


@pytest.mark.parametrize(
    ("story", "broken", "name", "instead"),
    [
        ("the_fence", Node, "_fence", lambda node, event, now: node._handlers[type(event)](event, now)),
        ("prefetched_tasks_go_back", Scheduler, "enqueue_first", Scheduler.enqueue),
        ("nested_tasks_on_one_cpu", Scheduler, "block", lambda scheduler, worker: None),
        ("placement_groups", Scheduler, "reserve", lambda scheduler, bundles: False),
        ("a_lost_object", Node, "_why_not_again", lambda node, task: ""),
        ("a_replay_diverges", Node, "_diverged", lambda node, old, template, parent: None),
        ("an_actor_is_made_again", Recovery, "note_executed", lambda recovery, call_id: None),
    ],
)
def test_a_broken_node_is_caught(
    story: str, broken: type, name: str, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken, name, instead)
    assert differs(SHOWN.with_name(f"{story}.txt"))


def differs(path: Path) -> bool:
    text = path.read_text("utf-8")
    try:
        return played(text) != text
    except AssertionError:
        return True


def with_transcript(page: str) -> str:
    head, rest = page.split(BETWEEN[0])
    tail = rest.split(BETWEEN[1])[1]
    return f"{head}{BETWEEN[0]}```\n{SHOWN.read_text('utf-8')}```\n{BETWEEN[1]}{tail}"


def test_the_transcript_on_the_architecture_page_is_the_file() -> None:
    page = PAGE.read_text("utf-8")
    assert page == with_transcript(page), "run python tests/test_transcripts.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_transcripts.py --write")
    status = 0
    for path in TRANSCRIPTS:
        before = path.read_text("utf-8")
        try:
            after = played(before)
        except AssertionError as error:
            sys.stdout.write(f"not written: {path.name}, {error}\n")
            status = 1
            continue
        if after != before:
            path.write_text(after, "utf-8")
            sys.stdout.write(f"written: {path.name}\n")
    PAGE.write_text(with_transcript(PAGE.read_text("utf-8")), "utf-8")
    sys.exit(status)
