import asyncio
import queue as standard
import signal
import threading
import time

import numpy as np
import pytest

import minray
from minray.util.queue import Empty, Full, Queue

pytestmark = pytest.mark.usefixtures("module_session")


@minray.remote
def put_one(queue, item):
    queue.put(item)


@minray.remote
def get_one(queue):
    return queue.get()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def waiting_at(queue):
    """How many calls wait in the actor."""
    return minray.get(queue.actor.__ray_call__.remote(lambda self: len(self._came._waiters) + len(self._went._waiters)))


def test_items_come_out_in_the_order_in_which_they_went_in():
    queue = Queue()
    for x in range(5):
        queue.put(x)
    assert (queue.qsize(), queue.size(), len(queue)) == (5, 5, 5)
    assert [queue.get() for _ in range(5)] == list(range(5))
    assert queue.empty() and not queue.full()


def test_who_does_not_wait_gets_empty_or_full_as_of_the_standard_library():
    queue = Queue(maxsize=1)
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(standard.Empty):
        queue.get(timeout=0.01)
    queue.put_nowait(1)
    assert queue.full()
    with pytest.raises(Full):
        queue.put_nowait(2)
    with pytest.raises(standard.Full):
        queue.put(2, timeout=0.01)
    assert queue.get() == 1 and queue.empty()
    for call in (queue.get, lambda timeout: queue.put(1, timeout=timeout)):
        with pytest.raises(ValueError, match="timeout"):
            call(timeout=-1)


def test_a_get_waits_for_a_put_elsewhere_and_a_put_for_a_get():
    queue = Queue(maxsize=1)
    got = get_one.remote(queue)
    until(lambda: waiting_at(queue) == 1)
    queue.put("first")
    assert minray.get(got) == "first"
    queue.put("second")
    put = put_one.remote(queue, "third")
    until(lambda: waiting_at(queue) == 1)
    assert queue.get() == "second"
    minray.get(put)
    assert queue.get() == "third"


def test_those_who_wait_are_served_in_the_order_in_which_they_came():
    queue = Queue()
    found = []

    def take(number):
        found.append((number, queue.get()))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        until(lambda: waiting_at(queue) == number + 1)  # noqa: B023
    for x in "abc":
        queue.put(x)
    for thread in threads:
        thread.join()
    assert sorted(found) == [(0, "a"), (1, "b"), (2, "c")]


def test_batches_go_in_and_come_out_whole_or_not_at_all():
    queue = Queue(maxsize=3)
    with pytest.raises(Full, match="4 items"):
        queue.put_nowait_batch(range(4))
    assert queue.empty()
    queue.put_nowait_batch(iter(range(3)))
    with pytest.raises(Empty, match="4 items"):
        queue.get_nowait_batch(4)
    assert queue.get_nowait_batch(2) == [0, 1] and queue.qsize() == 1
    assert queue.get_nowait_batch(0) == []
    for wrong, error in ((1.5, TypeError), (-1, ValueError)):
        with pytest.raises(error):
            queue.get_nowait_batch(wrong)
    with pytest.raises(TypeError):
        queue.put_nowait_batch(3)


def test_a_large_array_passes_through_without_a_copy():
    queue = Queue()
    sent = np.arange(200_000)
    ref = minray.put(sent)
    queue.put(ref)  # A ref is an item like another.
    queue.put(sent)
    assert queue.get() == ref
    received = queue.get()
    assert np.array_equal(received, sent) and not received.flags.writeable and not received.flags.owndata


def test_coroutines_wait_without_blocking_their_loop():
    async def main():
        queue = Queue(maxsize=1)
        both = asyncio.gather(queue.get_async(), queue.get_async())
        await queue.put_async("a")
        await queue.put_async("b")
        found = sorted(await both)
        with pytest.raises(Empty):
            await queue.get_async(timeout=0.01)
        with pytest.raises(Empty):
            await queue.get_async(block=False)
        return found

    assert asyncio.run(main()) == ["a", "b"]


def test_a_coroutine_that_is_cancelled_takes_no_item():
    queue = Queue()

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queue.get_async(), 0.05)

    asyncio.run(main())
    until(lambda: waiting_at(queue) == 0)
    queue.put("kept")
    assert queue.get(timeout=30) == "kept"


def test_a_get_that_is_interrupted_takes_no_item():
    queue = Queue()
    main_thread = threading.main_thread().ident

    def interrupt():
        until(lambda: waiting_at(queue) == 1)
        signal.pthread_kill(main_thread, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        queue.get()
    thread.join()
    until(lambda: waiting_at(queue) == 0)
    queue.put("kept")
    assert queue.get(timeout=30) == "kept"


def test_what_an_interrupted_get_had_taken_already_is_put_back():
    queue = Queue()
    queue.put(1)
    queue.put(2)
    ref = queue.actor.get.remote(1, None, b"ticket")
    minray.wait([ref])
    queue._abandon(KeyboardInterrupt(), ref, b"ticket")
    until(lambda: queue.qsize() == 2)
    assert [queue.get(), queue.get()] == [1, 2]


def test_more_may_wait_than_there_are_threads():
    queue = Queue(actor_options={"max_concurrency": 2})
    refs = [get_one.options(num_cpus=0).remote(queue) for _ in range(3)]
    until(lambda: waiting_at(queue) == 1)
    for x in range(3):
        queue.put(x)
    assert sorted(minray.get(refs)) == [0, 1, 2]


@pytest.mark.parametrize("force", [False, True])
def test_after_shutdown_the_queue_is_gone_for_those_who_wait_too(force):
    queue = Queue()
    ref = get_one.remote(queue)
    until(lambda: waiting_at(queue) == 1)
    queue.shutdown(force=force)
    with pytest.raises(minray.exceptions.ActorDiedError):
        minray.get(ref)
    with pytest.raises(minray.exceptions.ActorDiedError):
        queue.qsize()


def test_options_go_to_the_actor():
    queue = Queue(actor_options={"name": "inbox"})
    assert minray.get_actor("inbox") == queue.actor
    assert "inbox" in minray.util.list_named_actors()
    assert {"name": "inbox", "namespace": minray.get_runtime_context().namespace} in minray.util.list_named_actors(True)
    queue.shutdown()
    assert "inbox" not in minray.util.list_named_actors(all_namespaces=False)
