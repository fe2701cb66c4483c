import pytest

import minray
from minray.dag import (
    PARENT_CLASS_NODE_KEY,
    PREV_CLASS_METHOD_CALL_KEY,
    ClassMethodNode,
    FunctionNode,
    InputNode,
    MultiOutputNode,
)

pytestmark = pytest.mark.usefixtures("module_session")


@minray.remote
def add(a, b=0):
    return a + b


@minray.remote
class Counter:
    def __init__(self, value=0):
        self.value = value

    def add(self, x):
        self.value += x
        return self.value

    def get(self):
        return self.value


def run(node, *args, **kwargs):
    return minray.get(node.execute(*args, **kwargs))


def test_a_graph_of_functions_runs_when_it_is_executed_and_as_often():
    graph = add.bind(add.bind(1, 2), b=add.bind(3))
    assert isinstance(graph, FunctionNode)
    assert isinstance(graph.execute(), minray.ObjectRef)
    assert run(graph) == run(graph) == 6


def test_a_node_that_is_used_twice_runs_once(tmp_path):
    @minray.remote
    def leave_a_mark():
        mark = tmp_path / str(len(list(tmp_path.iterdir())))
        mark.touch()
        return 1

    shared = leave_a_mark.bind()
    assert run(add.bind(add.bind(shared, shared), add.bind(shared, 1))) == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_a_long_chain_needs_no_deep_stack():
    node = add.bind(0)
    for _ in range(2000):
        node = add.bind(node, 1)
    assert run(node) == 2000


def test_options_hold_in_a_graph():
    both = add.options(num_returns=2, name="both")
    refs = both.bind((1,), (2,)).execute()
    assert minray.get(refs) == [1, 2]
    assert both.bind(1).get_options() == {"num_returns": 2, "name": "both"}
    assert add.bind(1, b=2).get_args() == (1,) and add.bind(1, b=2).get_kwargs() == {"b": 2}


def test_a_class_node_makes_an_actor_a_run_and_calls_run_in_the_order_in_which_they_were_bound():
    first, second = Counter.bind(10), Counter.bind(value=10)
    assert run(first.get.bind()) == 10
    first.add.bind(2)
    first.add.bind(4)
    second.add.bind(6)
    graph = add.bind(first.get.bind(), second.get.bind())
    assert run(graph) == run(graph) == 32


def test_executing_a_class_node_gives_a_handle():
    handle = Counter.bind(add.bind(1, 2)).execute()
    assert minray.get(handle.get.remote()) == 3


def test_a_live_actor_is_part_of_a_graph_and_keeps_its_state():
    counter = Counter.remote(1)
    graph = counter.add.bind(add.bind(1, 1))
    assert isinstance(graph, ClassMethodNode) and graph.get_method_name() == "add"
    assert [run(graph), run(graph)] == [3, 5]


def test_methods_have_options_and_know_their_parents():
    node = Counter.bind()
    before = node.add.bind(1)
    call = node.add.options(name="plus").bind(1)
    assert call.get_options() == {"name": "plus"}
    parents = {PARENT_CLASS_NODE_KEY: node, PREV_CLASS_METHOD_CALL_KEY: before}
    assert call.get_other_args_to_resolve() == parents
    assert run(call) == 2


def test_one_input_is_used_whole_or_in_parts():
    with InputNode() as given:
        assert run(add.bind(given, 1), 5) == 6
        assert run(add.bind(given[0], given[1]), [1, 2]) == 3
        assert run(add.bind(given["a"], 1), {"a": 2}) == 3

    class Data:
        a = 20

    assert run(add.bind(given.a, given.a), Data()) == 40


def test_several_inputs_are_taken_by_position_and_name():
    with InputNode() as given:
        graph = add.bind(given[0], given.x)
    assert run(graph, 1, x=2) == 3
    assert run(MultiOutputNode([add.bind(given[0]), add.bind(given[1])]), 1, 2) == [1, 2]
    with pytest.raises(ValueError, match="the part 'x' of its input"):
        graph.execute(1, 2)
    with pytest.raises(ValueError, match="several values"):
        add.bind(given, 1).execute(1, 2)


def test_nodes_in_lists_and_dicts_become_refs_as_in_any_call():
    @minray.remote
    def total(refs, named):
        return sum(minray.get([*refs, *named.values()]))

    assert run(total.bind([add.bind(1), add.bind(2)], {"three": add.bind(3)})) == 6


def test_several_outputs_are_a_list_of_refs():
    one = add.bind(1)
    refs = MultiOutputNode([one, add.bind(one, 1)]).execute()
    assert minray.get(refs) == [1, 2]


def test_an_error_is_that_of_the_task():
    @minray.remote
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(add.bind(fail.bind(), 1))


def test_mistakes_are_named():
    with InputNode() as given, InputNode() as other:
        pass
    with pytest.raises(TypeError, match="InputNode: execute\\(\\) takes the value"):
        add.bind(given).execute()
    with pytest.raises(TypeError, match="no InputNode to take it"):
        add.bind(1).execute(2)
    with pytest.raises(ValueError, match="has 2"):
        add.bind(given, other).execute(1)
    with pytest.raises(AttributeError, match="no method 'ad'.*add.bind"):
        _ = Counter.bind().ad
    with pytest.raises(AttributeError, match="Did you mean add.bind"):
        Counter.bind().add.remote(1)
    with pytest.raises(TypeError, match="unexpected|argument"):
        Counter.bind(1, 2, 3).execute()
    with pytest.raises(ValueError, match="list of nodes"):
        MultiOutputNode(add.bind(1))
    with pytest.raises(TypeError, match="no length"):
        _ = [*given]
    with pytest.raises(NotImplementedError, match="compiled graphs"):
        add.bind(1).experimental_compile()
