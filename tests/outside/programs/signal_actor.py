"""Synchronisation by an asyncio actor: tasks wait for a signal; calls of one actor interleave at their awaits."""

import asyncio

import ray

ray.init(num_cpus=2)


@ray.remote(num_cpus=0)
class SignalActor:
    def __init__(self):
        self.ready_event = asyncio.Event()

    def send(self, clear=False):
        self.ready_event.set()
        if clear:
            self.ready_event.clear()

    async def wait(self, should_wait=True):
        if should_wait:
            await self.ready_event.wait()


@ray.remote
def wait_and_go(signal):
    ray.get(signal.wait.remote())
    return "go!"


signal = SignalActor.remote()
tasks = [wait_and_go.remote(signal) for _ in range(4)]
assert ray.wait(tasks, num_returns=4, timeout=0.1)[0] == []
ray.get(signal.send.remote())
assert ray.get(tasks) == ["go!"] * 4


@ray.remote
class AsyncActor:
    async def run_concurrent(self, i):
        await asyncio.sleep(0.1)
        return i


async def main():
    actor = AsyncActor.remote()
    return await asyncio.gather(*[actor.run_concurrent.remote(i) for i in range(4)])


assert asyncio.run(main()) == [0, 1, 2, 3]
print("signal: done")
