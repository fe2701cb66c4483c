"""External sort: more bytes than the object store may hold, so most of them spill to disk.

The input is a file of records as in sorting competitions: 100 bytes, of which the first
8 are the key.  A `split` task sorts its part of the file and cuts it into one object for
each range of keys; a `merge` task takes the objects of its range and writes them, merged,
to their place in the output file.  Between the two stages the whole input lives in the
object store, which is given memory for a quarter of it.  The rest goes to disk and comes
back, and no line of this program deals with that.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import minray
import minray.state

RECORD = np.dtype([("key", "u8"), ("payload", "V92")])

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--megabytes", type=int, default=256, help="size of the file to sort")
parser.add_argument("--store-megabytes", type=int, default=64, help="memory that the object store may use")
parser.add_argument("--parts", type=int, default=16, help="number of split tasks, and of merge tasks")


@minray.remote
def split(path, part, boundaries):
    """One part of the file as sorted arrays, one for each range of keys; and last, their lengths."""
    records = np.memmap(path, RECORD, mode="r")
    parts = len(boundaries) + 1
    records = records[len(records) * part // parts : len(records) * (part + 1) // parts]
    records = np.asarray(records[np.argsort(records["key"])])
    pieces = np.split(records, np.searchsorted(records["key"], boundaries))
    return [*pieces, [len(piece) for piece in pieces]]


@minray.remote
def merge(path, first, *pieces):
    """Merges the pieces of one range into the output file, from record number `first` on."""
    records = np.concatenate(pieces)
    output = np.memmap(path, RECORD, mode="r+")
    output[first : first + len(records)] = records[np.argsort(records["key"], kind="stable")]


def write_random_records(path, count):
    random = np.random.default_rng(seed=2017)
    with open(path, "wb") as file:
        for written in range(0, count, 100_000):
            file.write(random.bytes(RECORD.itemsize * min(100_000, count - written)))


def choose_boundaries(path, parts):
    """Keys that cut the file into ranges of about the same size, from a sample of it."""
    keys = np.memmap(path, RECORD, mode="r")["key"]
    sample = np.sort(keys[:: max(1, len(keys) // 10_000)])
    return sample[[len(sample) * i // parts for i in range(1, parts)]]


def megabytes_on_disk():
    """The size of what is spilled at this moment, as the GCS has it."""
    filters = [("location", "=", "spilled"), ("state", "=", "READY")]
    spilled = minray.state.list_objects(filters=filters, limit=100_000)
    return sum(row["object_size"] for row in spilled) / 1e6


def verify(input_path, output_path):
    before = np.memmap(input_path, RECORD, mode="r")["key"]
    after = np.memmap(output_path, RECORD, mode="r")["key"]
    assert len(before) == len(after), "records are missing"
    assert np.all(after[:-1] <= after[1:]), "records are out of order"
    assert before.sum() == after.sum(), "records were changed"


def main(options):
    count, parts = options.megabytes * 1_000_000 // RECORD.itemsize, options.parts
    with tempfile.TemporaryDirectory() as directory:
        input_path, output_path = Path(directory, "input"), Path(directory, "output")
        write_random_records(input_path, count)
        with open(output_path, "wb") as file:
            file.truncate(count * RECORD.itemsize)

        started = time.perf_counter()
        boundaries = choose_boundaries(input_path, parts)
        task = split.options(num_returns=parts + 1)
        outputs = [task.remote(input_path, part, boundaries) for part in range(parts)]
        *ranges, lengths = zip(*outputs)  # From one row a part to one row a range.
        sizes = np.sum(minray.get(list(lengths)), axis=0)
        spilled = megabytes_on_disk()

        firsts = np.cumsum(sizes) - sizes
        minray.get([merge.remote(output_path, first, *pieces) for first, pieces in zip(firsts, ranges)])
        elapsed = time.perf_counter() - started
        verify(input_path, output_path)

    print(f"sorted {count:,} records, {options.megabytes} MB, in {elapsed:.1f} s by {2 * parts} tasks")
    print(f"{spilled:.0f} MB of it were spilled to disk: the object store has {options.store_megabytes} MB")
    print("verified: nothing is missing, and the output is in order")


if __name__ == "__main__":
    options = parser.parse_args()
    with minray.init(object_store_memory=options.store_megabytes * 1_000_000):
        main(options)
