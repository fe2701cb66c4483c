"""MapReduce: mappers return one part for each reducer."""

from collections import Counter

import ray

TEXT = ["the quick brown fox", "the lazy dog", "the fox and the dog"] * 4
NUM_REDUCERS = 3


def map_function(document):
    return [(word, 1) for word in document.lower().split()]


@ray.remote(num_returns=NUM_REDUCERS)
def apply_map(corpus):
    parts = [[] for _ in range(NUM_REDUCERS)]
    for document in corpus:
        for word, count in map_function(document):
            parts[sum(map(ord, word)) % NUM_REDUCERS].append((word, count))
    return parts


@ray.remote
def apply_reduce(*results):
    counts = Counter()
    for result in results:
        for word, count in result:
            counts[word] += count
    return counts


map_results = [apply_map.remote(TEXT[i::4]) for i in range(4)]
outputs = [apply_reduce.remote(*[part[i] for part in map_results]) for i in range(NUM_REDUCERS)]
counts = sum(ray.get(outputs), Counter())
assert counts == Counter(word for document in TEXT for word in document.split())
print("map reduce:", counts.most_common(2))
