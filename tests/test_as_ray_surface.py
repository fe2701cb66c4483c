"""Every public name of Ray Core that programs use is found under ``ray``, or is listed as missing with its reason."""

import importlib.util
import json
import subprocess
import sys

import pytest


NAMES = """
remote get init put wait method shutdown cancel kill get_actor get_runtime_context is_initialized timeline nodes
available_resources cluster_resources get_gpu_ids ObjectRef ObjectID NodeID ActorID TaskID JobID WorkerID UniqueID
PlacementGroupID FunctionID ActorClassID LoggingConfig __version__ __commit__ logger cloudpickle exceptions util actor dag
ObjectRefGenerator DynamicObjectRefGenerator

actor.exit_actor actor.ActorHandle actor.ActorClass actor.ActorMethod actor.ActorClassInheritanceException actor.method
remote_function.RemoteFunction types.ObjectRef job_config.JobConfig runtime_env.RuntimeEnv
runtime_context.RuntimeContext runtime_context.get_runtime_context cluster_utils.Cluster
cloudpickle.dumps cloudpickle.loads cloudpickle.CloudPickler cloudpickle.cloudpickle.dumps

util.ActorPool util.list_named_actors util.register_serializer util.deregister_serializer util.inspect_serializability
util.check_serialize util.get_node_ip_address util.placement_group util.remove_placement_group
util.placement_group_table util.get_placement_group util.get_current_placement_group
util.actor_pool.ActorPool util.queue.Queue util.queue.Empty util.queue.Full
util.multiprocessing.Pool util.multiprocessing.TimeoutError util.multiprocessing.JoinableQueue
util.joblib.register_ray util.joblib.ray_backend.RayBackend
util.dask.ray_dask_get util.dask.enable_dask_on_ray util.dask.disable_dask_on_ray
util.metrics.Counter util.metrics.Gauge util.metrics.Histogram
util.collective.init_collective_group util.collective.allreduce util.collective.broadcast util.collective.barrier
util.state.list_tasks util.state.list_actors util.state.get_actor util.state.get_task util.state.list_objects
util.state.list_nodes util.state.list_workers util.state.list_jobs util.state.list_placement_groups
util.state.get_placement_group util.state.summarize_tasks util.state.summarize_actors util.state.summarize_objects
util.scheduling_strategies.PlacementGroupSchedulingStrategy util.scheduling_strategies.NodeAffinitySchedulingStrategy
util.scheduling_strategies.NodeLabelSchedulingStrategy util.placement_group.PlacementGroup
util.placement_group.get_current_placement_group util.placement_group.validate_placement_group
util.placement_group.VALID_PLACEMENT_GROUP_STRATEGIES util.annotations.PublicAPI util.annotations.DeveloperAPI
util.annotations.Deprecated util.check_serialize.inspect_serializability util.serialization.register_serializer
util.debug.log_once experimental.tqdm_ray.tqdm experimental.state.api.list_tasks experimental.state.api.list_actors

dag.InputNode dag.MultiOutputNode dag.DAGNode dag.FunctionNode dag.ClassNode dag.ClassMethodNode
dag.InputAttributeNode dag.PARENT_CLASS_NODE_KEY dag.PREV_CLASS_METHOD_CALL_KEY

_raylet.ObjectRef _raylet.ObjectID _raylet.ActorID _raylet.NodeID _raylet.TaskID _raylet.JobID
_private.worker.global_worker _private.worker.BaseContext _private.services.get_node_ip_address
_private.utils.get_system_memory _private.test_utils.wait_for_condition _private.test_utils.SignalActor
worker.global_worker worker.get

exceptions.RayTaskError exceptions.TaskCancelledError exceptions.RayActorError exceptions.WorkerCrashedError
exceptions.GetTimeoutError exceptions.ObjectReconstructionFailedError exceptions.ActorDiedError
exceptions.ActorUnavailableError exceptions.RayError exceptions.ActorUnschedulableError
exceptions.TaskUnschedulableError exceptions.ObjectLostError exceptions.OwnerDiedError exceptions.AsyncioActorExit
exceptions.TaskPlacementGroupRemoved exceptions.ActorPlacementGroupRemoved exceptions.UnserializableException
exceptions.RuntimeEnvSetupError exceptions.ObjectStoreFullError exceptions.OutOfMemoryError exceptions.OutOfDiskError
exceptions.NodeDiedError exceptions.ReferenceCountingAssertionError exceptions.PendingCallsLimitExceeded
exceptions.OufOfBandObjectRefSerializationException exceptions.RaySystemError exceptions.LocalRayletDiedError
exceptions.ObjectFetchTimedOutError exceptions.ObjectReconstructionFailedMaxAttemptsExceededError
exceptions.ObjectReconstructionFailedLineageEvictedError exceptions.PlasmaObjectNotAvailable

ObjectRef.future ObjectRef.as_future ObjectRef.hex ObjectRef.binary ObjectRef.task_id ObjectRef.job_id ObjectRef.nil
ObjectRef.size ObjectRef.is_nil ObjectRef.__await__
remote_function.RemoteFunction.remote remote_function.RemoteFunction.options remote_function.RemoteFunction._remote
remote_function.RemoteFunction.bind
actor.ActorClass.remote actor.ActorClass.options actor.ActorClass._remote actor.ActorClass.bind
actor.ActorMethod.remote actor.ActorMethod.options actor.ActorMethod._remote actor.ActorMethod.bind
actor.ActorHandle._actor_id actor.ActorHandle._ray_actor_id
""".split()
NAMES += [
    f"runtime_context.RuntimeContext.{name}"
    for name in """
    get_node_id get_job_id get_task_id get_actor_id get_actor_name get_assigned_resources get_placement_group_id
    get_task_name get_task_function_name get_node_labels get_worker_id current_actor namespace is_canceled
    was_current_actor_reconstructed get_accelerator_ids job_id node_id task_id actor_id worker_id runtime_env get
    """.split()
]
NAMES += [f"util.ActorPool.{name}" for name in (
    "submit", "map", "map_unordered", "get_next", "get_next_unordered", "has_next", "has_free", "push", "pop_idle",
)]  # fmt: skip
NAMES += [f"util.queue.Queue.{name}" for name in (
    "put", "get", "put_nowait", "get_nowait", "put_async", "get_async", "put_nowait_batch", "get_nowait_batch",
    "qsize", "size", "empty", "full", "shutdown",
)]  # fmt: skip
NAMES += [f"util.multiprocessing.Pool.{name}" for name in (
    "apply", "apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered", "close",
    "terminate", "join",
)]  # fmt: skip
NAMES += [f"cluster_utils.Cluster.{name}" for name in (
    "add_node", "remove_node", "wait_for_nodes", "list_all_nodes", "connect", "shutdown",
)]  # fmt: skip

MODULES = """
actor cloudpickle cluster_utils dag exceptions experimental experimental.state.api experimental.tqdm_ray remote_function
runtime_context types util util.actor_pool util.annotations util.collective util.dask util.joblib util.metrics
util.multiprocessing util.queue util.state _raylet _private _private.worker worker
""".split()

for library in ("dask", "joblib"):  # What needs a library can be looked for where there is one.
    if importlib.util.find_spec(library) is None:
        NAMES = [name for name in NAMES if not name.startswith(f"util.{library}.")]
        MODULES.remove(f"util.{library}")

OUTSIDE = (
    "air data llm rllib serve train tune workflow autoscaler job_submission dashboard cross_language util.client util.iter"
).split()

LOOK = """
import importlib, json, sys
import ray

def resolve(name):
    thing, module = ray, "ray"
    for part in name.split("."):
        module += "." + part
        try:
            thing = importlib.import_module(module)
        except ImportError:
            thing = getattr(thing, part)

missing = []
for name in json.loads(sys.argv[1]):
    try:
        resolve(name)
    except AttributeError:
        missing.append(name)
print(json.dumps(missing))
"""


def as_ray(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "minray.as_ray", *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there():
    assert len(NAMES) == len(set(NAMES))
    assert json.loads(as_ray("-c", LOOK, json.dumps(NAMES))) == []


def test_every_public_module_is_imported_under_its_name_and_is_named_so():
    program = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    module = importlib.import_module("ray." + name)
    assert module.__name__ == "ray." + name, module
    assert sys.modules["ray." + name] is module
    assert importlib.util.find_spec("ray." + name) is not None
"""
    as_ray("-c", program, json.dumps(MODULES))


def test_what_is_out_of_scope_says_so_when_it_is_imported_and_only_then():
    program = """
import importlib, importlib.util, json, sys
import ray
for name in json.loads(sys.argv[1]):
    for statement in (f"import ray.{name}", f"from ray.{name} import anything", "from ray{} import {}".format(*(
        ("." + name).rpartition(".")[0::2]
    ))):
        try:
            exec(statement)
        except ImportError as error:
            assert f"ray.{name} " in str(error) and "minray" in str(error), (statement, str(error))
        else:
            raise AssertionError(statement)
    assert importlib.util.find_spec("ray." + name) is None, name
    parent, _, last = ("ray." + name).rpartition(".")
    assert not hasattr(importlib.import_module(parent), last), name
try:
    import ray.no_such_thing
except ModuleNotFoundError as error:
    assert "ray.no_such_thing" in str(error)
"""
    as_ray("-c", program, json.dumps(OUTSIDE))


@pytest.mark.parametrize("name", ["pickle", "cloudpickle"])
def test_modules_of_ray_can_be_pickled_and_load_without_as_ray(name):
    pickled = as_ray("-c", f"import ray, ray.util, {name}; print({name}.dumps([ray, ray.util]).hex())").strip()
    program = f"import pickle; ray, util = pickle.loads(bytes.fromhex({pickled!r})); print(ray.__name__, util.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ray ray.util\n", done.stderr
