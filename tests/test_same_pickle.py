"""Pickles of one value that differ in which equal strings are one object."""

import doctest
import pickle

import cloudpickle

from minray import same_pickle
from minray.same_pickle import says_the_same


def test_the_docstrings_examples_run():
    assert doctest.testmod(same_pickle).failed == 0


def test_a_function_that_was_pickled_before_and_after_a_journey_is_the_same():
    namespace = {"__name__": "__main__"}
    exec("def tree(depth):\n    return tree(depth - 1) + len('tree')", namespace)
    first = cloudpickle.dumps(namespace["tree"])
    again = cloudpickle.dumps(pickle.loads(first))
    third = cloudpickle.dumps(pickle.loads(again))
    assert says_the_same(first, again) and says_the_same(first, third)


def test_what_a_function_has_captured_makes_another_of_it():
    def adding(amount):
        return lambda x: x + amount

    one, two, same = (cloudpickle.dumps(adding(amount)) for amount in (1, 2, 1))
    assert not says_the_same(one, two) and says_the_same(one, same)


def test_back_references_to_other_objects_count():
    a, b = [], []
    assert not says_the_same(pickle.dumps([a, b, a], 5), pickle.dumps([a, b, b], 5))
    assert not says_the_same(None, pickle.dumps(1)) and not says_the_same(b"", b"no pickle") and says_the_same(None, None)
