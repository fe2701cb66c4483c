"""Pipelining: a worker asks for its next item before it processes the one in hand."""

import ray


@ray.remote
class WorkQueue:
    def __init__(self):
        self.queue = list(range(10))

    def get_work_item(self):
        return self.queue.pop(0) if self.queue else None


@ray.remote
class WorkerWithoutPipelining:
    def __init__(self, work_queue):
        self.work_queue = work_queue

    def process(self, work_item):
        return work_item * 2

    def run(self):
        processed = []
        while True:
            work_item = ray.get(self.work_queue.get_work_item.remote())
            if work_item is None:
                break
            processed.append(self.process(work_item))
        return processed


@ray.remote
class WorkerWithPipelining:
    def __init__(self, work_queue):
        self.work_queue = work_queue

    def process(self, work_item):
        return work_item * 2

    def run(self):
        processed = []
        self.work_item_ref = self.work_queue.get_work_item.remote()
        while True:
            work_item = ray.get(self.work_item_ref)
            if work_item is None:
                break
            self.work_item_ref = self.work_queue.get_work_item.remote()
            processed.append(self.process(work_item))
        return processed


for worker_class in (WorkerWithoutPipelining, WorkerWithPipelining):
    worker = worker_class.remote(WorkQueue.remote())
    assert ray.get(worker.run.remote()) == [item * 2 for item in range(10)]
print("pipelining: done")
